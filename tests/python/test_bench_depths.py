"""How `bench` gets to a depth, what it does there, and what single tokens wait for. How fast it is, is not tested."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benching import TOKENS
from lminf_edge import Llama, LMInfConfig
from lminf_edge.errors import UnsupportedModelError
from lminf_edge.evaluation.bench import work
from lminf_edge.evaluation.bench.copied_state import CacheState, parse_state, repeated_state
from lminf_edge.evaluation.bench.stalls import stall_summary
from lminf_edge.evaluation.context_shift import ShiftingLlama
from tiny_families import HYBRID, SLIDING_AND_FULL

# what is copied to get to a depth
from tiny_models import TinyModel, write_tiny_model


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_a_copied_state_as_long_as_what_was_read_is_what_was_read(
    tiny_model: TinyModel, flash_attn: bool, cache_type: str
) -> None:
    value_type = cache_type if flash_attn else "f16"
    with Llama(
        tiny_model.path, n_ctx=256, n_threads=1, flash_attn=flash_attn, cache_type_k=cache_type, cache_type_v=value_type
    ) as llm:
        llm.eval(TOKENS[:50].tolist())
        state = llm._context.get_state()
    assert repeated_state(state, 50) == state


@pytest.mark.parametrize("flash_attn", [True, False])
def test_a_longer_copy_repeats_keys_and_values_and_can_be_decoded(head_64: TinyModel, flash_attn: bool) -> None:
    with Llama(head_64.path, n_ctx=512, n_threads=1, flash_attn=flash_attn) as llm:
        llm.eval(TOKENS[:50].tolist())
        state = llm._context.get_state()
        list(work.copy_to(llm, state, 420))
        assert llm.n_past == 420
        held = llm._context.get_state()
        assert np.isfinite(llm.eval([5])).all()
    (read,), (copied,) = parse_state(state), parse_state(held)
    assert copied.positions == list(range(420))
    for cell in (0, 49, 50, 277, 419):
        assert _cell(copied, cell) == _cell(read, cell % 50)
    assert _cell(read, 0) != _cell(read, 1)


def _cell(cache: CacheState, cell: int) -> list[bytes]:
    parts = []
    for rows in (*cache.keys, *cache.values):
        n_part = len(rows.data) // rows.n_parts
        for part in range(rows.n_parts):
            begin = part * n_part + cell * rows.size
            parts.append(bytes(rows.data[begin : begin + rows.size]))
    return parts


def test_a_copy_decodes_as_what_was_read_does(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_ctx=256, n_threads=1) as llm, Llama(head_32.path, n_ctx=512, n_threads=1) as other:
        llm.eval(TOKENS[:50].tolist())
        list(work.copy_to(other, next(work.save_read(llm)), 50))
        np.testing.assert_array_equal(llm.eval([9]), other.eval([9]))


def test_sliding_layers_keep_the_end_of_a_copied_context(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "gemma2.gguf", SLIDING_AND_FULL["gemma2"], seed=3)
    with Llama(model.path, n_ctx=256, n_threads=1, n_ubatch=32) as llm:
        llm.eval(TOKENS[:50].tolist())
        state = llm._context.get_state()
        list(work.copy_to(llm, state, 200))
        assert llm.n_past == 200
        full, sliding = parse_state(llm._context.get_state())
        assert np.isfinite(llm.eval([5])).all()
    assert full.positions == list(range(200))
    assert sliding.positions[-1] == 199
    assert 0 < len(sliding.positions) < 50
    assert repeated_state(state, 50) == state


def test_a_recurrent_state_cannot_be_copied(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "lfm2.gguf", HYBRID["lfm2"], seed=3)
    with Llama(model.path, n_ctx=256, n_threads=1) as llm:
        llm.eval(TOKENS[:20].tolist())
        with pytest.raises(UnsupportedModelError, match="cannot be filled by copying"):
            repeated_state(llm._context.get_state(), 40)


# where a turn takes place


def test_an_endless_sequence_gets_to_any_position_with_its_window_full(head_32: TinyModel) -> None:
    config = LMInfConfig(n_sink=4, n_window=64)
    for depth in (0, 40, 300, 2**20, 2**40):
        with Llama(head_32.path, lminf=config, n_threads=1, n_ubatch=32) as llm:
            list(work.jump_to(llm, TOKENS, depth))
            assert llm.n_past == depth
            assert llm.memory_stats().n_cells_used == min(depth, 4 + 64)


def test_each_turn_begins_at_the_same_depth(head_32: TinyModel) -> None:
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64), n_threads=1, n_ubatch=32) as llm:
        list(work.jump_to(llm, TOKENS, 2**20))
        for _ in range(3):
            (turn,) = work.decode_turn(llm, TOKENS, 2**20, 10, 60.0)
            assert turn.n_tokens == 10
            assert turn.seconds > 0
            assert llm.n_past == 2**20 + 11
        (turn,) = work.decode_turn(llm, TOKENS, 2**20, 10, 0.0)
        assert turn.n_tokens == work.N_AT_LEAST


def test_a_shifted_context_has_its_turns_in_the_middle_of_its_cycle(head_32: TinyModel) -> None:
    with closing(ShiftingLlama(head_32.path, n_ctx=256, n_keep=4, n_threads=1, n_ubatch=32)) as llm:
        list(work.shift_to(llm, TOKENS, 190, 5000))
        assert llm.n_shifts == 1
        assert llm.n_past == 5000
        for _ in range(2):
            next(work.decode_turn(llm, TOKENS, 5000, 4, 60.0))
            assert llm._context.n_past() == 195


def test_recomputation_reads_the_window_for_each_token(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_ctx=256, n_threads=1) as llm:
        for _ in range(2):
            (turn,) = work.recompute_turn(llm, TOKENS, 64)
            assert turn.n_tokens == 1
            assert llm.n_past == 64


# stalls


def test_each_token_is_counted_under_what_it_waited_for(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMINF_ATTENTION", "stock")  # ours has no sink tokens to place
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64, n_block=16), n_threads=1, n_ubatch=32) as llm:
        list(work.jump_to(llm, TOKENS, 65536 - 60))
        timed = list(work.time_tokens(llm, TOKENS, 100))
    stalls = [stall for piece in timed for stall in piece.stalls]
    first = 65536 - 60 + 1
    assert Counter(stalls)["rebase"] == 1
    placed = [first + i for i, stall in enumerate(stalls) if stall == "placement"]
    assert placed == [p for p in range(first, first + 100) if p % 16 == 0 and stalls[p - first] != "rebase"]
    assert set(stalls) == {"rebase", "placement", "eviction"}
    assert sum(len(piece.seconds) for piece in timed) == 100


def test_a_stall_has_its_count_its_median_and_its_largest_time() -> None:
    summary = stall_summary([1.0, 5.0, 2.0, 3.0], ["eviction", "rebase", "eviction", "eviction"])
    by_name = {stall["name"]: stall for stall in summary}
    assert by_name["eviction"] == {"name": "eviction", "count": 3, "median": 2.0, "max": 3.0}
    assert by_name["rebase"] == {"name": "rebase", "count": 1, "median": 5.0, "max": 5.0}
    assert by_name["shift"] == {"name": "shift", "count": 0, "median": None, "max": None}
