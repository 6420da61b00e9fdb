"""Other programs that are measured beside: the same weights, and what goes wrong there is said."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benching import TOKENS, settings_for
from lminf_edge.errors import ConfigError, LMInfError
from lminf_edge.evaluation.bench import run_bench
from lminf_edge.evaluation.peers import protocol
from lminf_edge.evaluation.peers.gguf_llama import read_llama, without_permutation
from lminf_edge.evaluation.results import ResultLog
from reference import FULL_ATTENTION, Layer, Rope, TokenStream, Transformer
from tiny_families import SLIDING_AND_FULL
from tiny_models import N_VOCAB, TinyModel, write_tiny_model

STAND_IN = Path(__file__).parent / "stand_ins" / "peer.py"


def test_weights_for_a_peer_are_the_models(tiny_model: TinyModel) -> None:
    config, weights = read_llama(tiny_model.path)
    assert config["num_hidden_layers"] == tiny_model.shape.n_layer
    assert config["vocab_size"] == N_VOCAB
    assert config["tie_word_embeddings"] is tiny_model.shape.tied_embeddings
    # halves that turn against each other with these rows are neighbours that turn with the file's
    halves = replace(
        tiny_model.shape.architecture,
        layers=(Layer(Rope(tiny_model.shape.head_size, order="neox")),) * tiny_model.shape.n_layer,
    )
    tokens = TOKENS[:40].tolist()
    ours = TokenStream(tiny_model.transformer, FULL_ATTENTION).eval(tokens)
    theirs = TokenStream(Transformer(_with_gguf_names(weights), halves), FULL_ATTENTION).eval(tokens)
    np.testing.assert_allclose(theirs, ours, atol=1e-9)


def _with_gguf_names(weights: dict[str, Any]) -> dict[str, Any]:
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
        "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    renamed = {}
    for name, values in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = values
    return renamed


def test_the_rows_of_each_head_are_sorted() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert without_permutation(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_peer_runs_plain_llama_models_only(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "gemma2.gguf", SLIDING_AND_FULL["gemma2"], seed=3)
    with pytest.raises(ValueError, match="plain llama models only: gemma2"):
        read_llama(model.path)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes the place of the package."""
    monkeypatch.setitem(protocol.SCRIPTS, "attention-sinks", STAND_IN)
    monkeypatch.setitem(protocol.NEEDED, "attention-sinks", ("numpy",))


@pytest.mark.usefixtures("stand_in")
def test_a_peer_is_compared_and_measured_beside_ours(head_32: TinyModel, tmp_path: Path) -> None:
    settings = settings_for(
        head_32,
        setup={"methods": ("endless", "full")},
        depths=(100, 600),
        far=None,
        recompute=False,
        prompts=(),
        n_latency=0,
        peer="attention-sinks",
    )
    with ResultLog(tmp_path / "results.jsonl") as log:
        run_bench(settings, log)
    (compared,) = log.of_kind("bench.peer")
    assert compared["versions"] == {"stand-in": "1.0"}
    assert compared["same_argmax"] == 1.0
    assert compared["largest_difference"] < 1e-3
    assert compared["loss"] == pytest.approx(compared["loss_here"], abs=1e-3)
    decoded = {r["depth"]: r for r in log.of_kind("bench.decode") if r["method"] == "attention-sinks"}
    assert set(decoded) == {100, 600}
    for depth, record in decoded.items():
        assert record["tokens_per_second"]["median"] == 4 / 0.5
        assert (record["kv_bytes"], record["resident_bytes"]) == (1000, 2000)
        assert record["bytes_per_token"] == head_32.path.stat().st_size + 1000
        assert record["of"] == {"method": "endless", "cache_type": "f16", "depth": depth}
    before = len(log.records)
    with ResultLog(tmp_path / "results.jsonl") as log:
        run_bench(settings, log)
    assert len(log.records) == before


def test_what_goes_wrong_in_a_peer_is_said(head_32: TinyModel) -> None:
    with protocol.Peer([sys.executable, STAND_IN]) as peer:
        peer.open(str(head_32.path), 4, 64, 1)
        with pytest.raises(LMInfError, match="the peer failed: as asked"):
            peer.ask("fail")
        with pytest.raises(LMInfError, match="the peer answered .*no answer"):
            peer.ask("babble")
        with pytest.raises(LMInfError, match="exit code 1: cannot dance"):
            peer.ask("dance", tokens=[5])
    with pytest.raises(LMInfError, match="cannot start"):
        protocol.Peer([os.devnull + "/python"])


def test_a_peer_that_is_not_installed_is_asked_for(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(protocol.NEEDED, "attention-sinks", ("numpy", "no_such_package"))
    with pytest.raises(ConfigError, match=r"missing: \['no_such_package'\].*pip install 'lminf-edge\[peers\]'"):
        protocol.peer_command("attention-sinks", None)
    with pytest.raises(ConfigError, match="cannot run /no/python"):
        protocol.peer_command("attention-sinks", "/no/python")
    with ResultLog() as log, pytest.raises(ConfigError, match="not installed"):
        run_bench(settings_for(head_32, peer="attention-sinks"), log)
    assert log.records == []
