"""What a decoding step must read, and how fast memory can be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from benching import settings_for
from lminf_edge._library import _core
from lminf_edge.evaluation.bench.bandwidth import read_bandwidth
from lminf_edge.evaluation.bench.plan import Place, bytes_per_token
from lminf_edge.evaluation.bench.step_bytes import (
    _BLOCKS,
    StepBytes,
    TensorInfo,
    read_tensor_infos,
    step_bytes,
    weights_read,
)
from tiny_families import SLIDING_AND_FULL
from tiny_models import HEAD_32, TinyModel, write_tiny_model


def test_tensor_sizes_are_those_that_others_know(default_model: Path, tmp_path: Path) -> None:
    assert sum(info.n_bytes for info in read_tensor_infos(default_model)) == _core.Model(str(default_model)).n_bytes
    model = write_tiny_model(tmp_path / "f16.gguf", HEAD_32, seed=1, weight_type="f16")
    ours = {info.name: (info.shape, info.n_bytes) for info in read_tensor_infos(model.path)}
    theirs = {t.name: (tuple(int(n) for n in t.shape), int(t.n_bytes)) for t in gguf.GGUFReader(model.path).tensors}
    assert ours == theirs
    sizes = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: size for kind, size in _BLOCKS.items() if sizes.get(kind, size) != size} == {}


@pytest.mark.parametrize(("cache_type", "row"), [("f16", 64 * 2), ("q8_0", 64 // 32 * 34), ("q4_0", 64 // 32 * 18)])
def test_a_step_reads_all_weights_but_a_table_of_embeddings(head_32: TinyModel, cache_type: str, row: int) -> None:
    weights = sum(weight.nbytes for name, weight in head_32.weights.items() if name != "token_embd.weight")
    step = step_bytes(head_32.path, cache_type)
    assert step.weights == weights + HEAD_32.n_embd * 4
    # two layers with keys and values of two heads of 32 components
    assert step == StepBytes(weights=step.weights, per_key=2 * 2 * row)
    assert step.at(70, 1000) == step.weights + 70 * 2 * 2 * row


def test_tied_embeddings_are_read_whole(tied: TinyModel) -> None:
    assert step_bytes(tied.path, "f16").weights == sum(weight.nbytes for weight in tied.weights.values())


def test_experts_that_are_not_asked_are_not_read() -> None:
    tensors = [TensorInfo(name="blk.0.ffn_up_exps.weight", shape=(8, 8, 4), n_bytes=1024)]
    assert weights_read(tensors, 0.25) == 256


def test_sliding_layers_read_their_own_window(tmp_path: Path) -> None:
    shape = replace(SLIDING_AND_FULL["gemma2"], n_ctx_train=2048)
    model = write_tiny_model(tmp_path / "gemma2.gguf", shape, seed=3)
    step = step_bytes(model.path, "f16")
    row = 2 * shape.n_head_kv * shape.head_size * 2  # keys and values of one layer; two of four layers slide
    assert (step.per_key, step.sliding_per_key, step.n_sliding) == (2 * row, 2 * row, 12)
    assert step.at(100, 100) - step.weights == 100 * 2 * row + 12 * 2 * row


def test_a_method_reads_what_it_sees(head_32: TinyModel) -> None:
    settings = settings_for(head_32, n_decode=4)  # the middle of a turn: four tokens later
    step = StepBytes(weights=1000, per_key=10)

    def n_bytes(method: str, depth: int) -> int | None:
        return bytes_per_token(settings, Place(method=method, cache_type="f16", depth=depth, filled="read"), step)

    assert n_bytes("full", 600) == 1000 + 604 * 10
    assert n_bytes("endless", 0) == 1000 + 4 * 10
    assert n_bytes("endless", 62) == 1000 + (64 + 2) * 10
    assert n_bytes("endless", 2**20) == 1000 + (64 + 4) * 10
    assert n_bytes("shift", 600) == 1000 + (settings.n_used_by_shift + 4) * 10
    assert n_bytes("recompute", 600) is None


def test_bandwidth_is_that_of_arrays_read() -> None:
    spread = read_bandwidth(2, n_bytes=1 << 20, n_repetitions=3)
    assert 0 < spread.low <= spread.median <= spread.high
