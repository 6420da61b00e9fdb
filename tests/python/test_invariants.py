"""What stays the same: logits however a text is cut, stored keys, memory, and the error of a small cache."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from reference import FULL_ATTENTION, Attention, TokenStream
from tiny_models import TinyModel, random_tokens

if TYPE_CHECKING:
    from conftest import OpenLlama
    from lminf_edge import Llama

ROUNDING = 1e-4
"""Sums of F32 numbers in another order move the tiny models' logits by less than this; they are of the order of 1."""

CACHE_TYPES = ["f32", "f16", "q8_0", "q4_0"]
BLOCKS = Attention(n_sink=4, n_window=32, n_clamp=32, n_block=8)


class TestBatchInvariance:
    @pytest.mark.parametrize(
        "attention",
        [BLOCKS, Attention(4, 32, 20), Attention(16, 24, 64, 16, "kept")],
        ids=["blocks", "exact-clamp", "kept"],
    )
    def test_the_cut_into_micro_batches_changes_nothing(
        self, open_llama: OpenLlama, tiny_model: TinyModel, attention: Attention
    ) -> None:
        tokens = random_tokens(1100, seed=1)
        one_by_one = logits_of(open_llama(tiny_model, attention, n_ubatch=1, deterministic=True), tokens)
        for n_ubatch in (7, 64, 512):
            logits = logits_of(open_llama(tiny_model, attention, n_ubatch=n_ubatch, deterministic=True), tokens)
            assert np.array_equal(logits, one_by_one)
            logits = logits_of(open_llama(tiny_model, attention, n_ubatch=n_ubatch), tokens)
            assert np.abs(logits - one_by_one).max() < ROUNDING

    @pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
    def test_a_smaller_cache_does_not_depend_on_the_cut_either(
        self, open_llama: OpenLlama, head_64: TinyModel, cache_type: str
    ) -> None:
        tokens = random_tokens(600, seed=2)
        options: dict[str, Any] = {"cache_type": cache_type, "flash_attn": True, "deterministic": True}
        small, large = (
            logits_of(open_llama(head_64, BLOCKS, n_ubatch=n_ubatch, **options), tokens) for n_ubatch in (1, 64)
        )
        assert np.array_equal(small, large)


class TestNothingChangesBeforeItMust:
    @pytest.mark.parametrize("flash_attn", [False, True])
    @pytest.mark.parametrize(
        ("attention", "n_same"),
        [
            (Attention(4, 100, 150, 16), 100 + 4),  # token 104 is the first that misses a key, token 4
            (Attention(4, 200, 100, 16), 96),  # the block that begins at 96 ends beyond 100
            (Attention(4, 200, 100, 1), 101),
            (Attention(0, 100, 100, 16), 100),
            (Attention(16, 100, 150, 16, "kept"), 116),
        ],
    )
    def test_logits_are_those_of_full_attention(
        self, open_llama: OpenLlama, tiny_model: TinyModel, attention: Attention, n_same: int, flash_attn: bool
    ) -> None:
        tokens = random_tokens(n_same + 1, seed=3)
        full = logits_of(open_llama(tiny_model, FULL_ATTENTION), tokens)  # llama.cpp's flash attention rounds to F16
        ours = logits_of(open_llama(tiny_model, attention, flash_attn=flash_attn), tokens)
        difference = np.abs(ours - full).max(axis=1)
        assert difference[:n_same].max() < ROUNDING
        assert difference[n_same] > 10 * ROUNDING


class TestStoredKeys:
    @pytest.mark.parametrize("cache_type", CACHE_TYPES)
    @pytest.mark.parametrize("n_ubatch", [1, 16])
    def test_a_window_key_is_never_rewritten(
        self, open_llama: OpenLlama, tiny_model: TinyModel, cache_type: str, n_ubatch: int
    ) -> None:
        with open_llama(tiny_model, BLOCKS, n_ubatch=n_ubatch, cache_type=cache_type, flash_attn=True) as llm:
            versions, lifetimes = key_versions(llm, tiny_model, n_tokens=600)
            assert llm.memory_stats().n_rebases == 0
        assert min(lifetimes.values()) >= 32
        assert set(versions.values()) == {1}

    @pytest.mark.parametrize("cache_type", CACHE_TYPES)
    @pytest.mark.parametrize("n_ubatch", [1, 16])
    def test_a_rebase_rewrites_a_window_key_once(
        self, open_llama: OpenLlama, tiny_model: TinyModel, cache_type: str, n_ubatch: int
    ) -> None:
        with open_llama(
            tiny_model, BLOCKS, n_ubatch=n_ubatch, cache_type=cache_type, flash_attn=True, _n_rebase=1
        ) as llm:
            versions, _ = key_versions(llm, tiny_model, n_tokens=1200)
            assert llm.memory_stats().n_rebases >= 2
        assert set(versions.values()) == {1, 2}

    @pytest.mark.parametrize("cache_type", CACHE_TYPES)
    def test_the_originals_of_sink_tokens_never_change(
        self, open_llama: OpenLlama, tiny_model: TinyModel, cache_type: str
    ) -> None:
        tokens = random_tokens(1000, seed=5)
        with open_llama(tiny_model, BLOCKS, n_ubatch=16, cache_type=cache_type, flash_attn=True, _n_rebase=1) as llm:
            llm.eval(tokens[:4])
            first = sink_originals(llm, tiny_model)
            for start in range(4, len(tokens), 50):
                llm.eval(tokens[start : start + 50])
                assert sink_originals(llm, tiny_model) == first
            assert llm.memory_stats().n_rebases >= 1
            assert llm._context.test_set_position(200_000_000)
            llm.eval(tokens)
            assert sink_originals(llm, tiny_model) == first

    def test_the_originals_are_the_keys_before_rope(self, open_llama: OpenLlama, tiny_model: TinyModel) -> None:
        """In F32, also when the cache has another type. Those of the first layer depend on the token alone."""
        tokens = random_tokens(4, seed=6)
        transformer = tiny_model.transformer
        keys, _ = transformer.keys_values(0, transformer.embed(tokens))
        with open_llama(tiny_model, BLOCKS, cache_type="q4_0", flash_attn=True) as llm:
            llm.eval(tokens)
            originals = [llm._context.test_get_sink_original(0, sink) for sink in range(4)]
        for original, key in zip(originals, keys, strict=True):
            assert original is not None
            np.testing.assert_allclose(np.frombuffer(original, np.float32), key.ravel(), rtol=0, atol=1e-5)


class TestMemory:
    def test_a_long_stream_takes_no_more_memory_than_a_short_one(self, head_32: TinyModel) -> None:
        """Measured in a process of its own, so that nothing else allocates."""
        finished = subprocess.run(
            [sys.executable, "-c", MEASURE_MEMORY, str(head_32.path)], capture_output=True, text=True, check=True
        )
        after_100, after_100_000 = json.loads(finished.stdout)
        assert (after_100["n_past"], after_100_000["n_past"]) == (100, 100_000)
        assert after_100_000["kv_bytes"] == after_100["kv_bytes"]
        assert after_100_000["resident_bytes"] - after_100["resident_bytes"] < 2**20

    @pytest.mark.parametrize("cache_type", CACHE_TYPES)
    def test_the_parameters_alone_decide_the_size_of_the_cache(
        self, open_llama: OpenLlama, head_32: TinyModel, cache_type: str
    ) -> None:
        with open_llama(head_32, BLOCKS, cache_type=cache_type, flash_attn=True) as llm:
            sizes = []
            for n_tokens in (1, 3, 60, 500):
                llm.eval(random_tokens(n_tokens, seed=7))
                sizes.append((llm.memory_stats().kv_bytes, llm.memory_stats().n_cells))
            assert len(set(sizes)) == 1


class TestQuantisedCaches:
    @pytest.mark.parametrize(("cache_type", "tolerance"), [("f16", 0.001), ("q8_0", 0.03), ("q4_0", 0.35)])
    def test_a_quantised_cache_stays_as_close_to_the_reference_as_it_began(
        self, open_llama: OpenLlama, tiny_model: TinyModel, cache_type: str, tolerance: float
    ) -> None:
        """Root mean square error of the logits, which are of the order of 1, in each quarter of 20 windows.

        Measured, with rebases: f16 0.0003 to 0.0006, q8_0 0.010 to 0.018, q4_0 0.13 to 0.23, the same in every quarter.
        """
        attention = Attention(n_sink=4, n_window=64, n_clamp=64, n_block=16)
        tokens = random_tokens(20 * 64, seed=8)
        llm = open_llama(tiny_model, attention, cache_type=cache_type, flash_attn=True, _n_rebase=1)
        error = logits_of(llm, tokens) - TokenStream(tiny_model.transformer, attention).eval(tokens)
        quarters = [float(np.sqrt(np.mean(quarter**2))) for quarter in np.split(error, 4)]
        assert max(quarters) < tolerance
        assert quarters[3] < 1.25 * quarters[1]


class TestRemovingTheTail:
    @pytest.mark.parametrize("n_ubatch", [1, 7, 64])
    @pytest.mark.parametrize("n_removed", [1, 9, 40])
    @pytest.mark.parametrize("n_past", [60, 333])
    def test_removed_tokens_leave_no_trace(
        self, open_llama: OpenLlama, head_32: TinyModel, n_ubatch: int, n_removed: int, n_past: int
    ) -> None:
        text, removed, tail = (random_tokens(n, seed=n) for n in (n_past, n_removed, 100))
        with open_llama(head_32, BLOCKS, n_ubatch=n_ubatch, n_rollback=40, deterministic=True) as llm:
            llm.eval(text)
            straight = llm.eval(tail)
            llm.reset()
            llm.eval(text)
            llm.eval(removed)
            assert llm._context.seq_rm(0, n_past)
            assert llm.n_past == n_past
            again = llm.eval(tail)
        assert np.array_equal(again, straight)

    def test_tokens_can_be_removed_again_and_again(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        tokens = random_tokens(500, seed=9)
        with open_llama(head_32, BLOCKS, n_ubatch=16, n_rollback=20) as llm:
            logits = []
            for start in range(0, len(tokens), 10):
                logits.append(llm.eval(tokens[start : start + 10]))
                llm.eval(random_tokens(20, seed=start))
                assert llm._context.seq_rm(0, start + 10)
            straight = TokenStream(head_32.transformer, BLOCKS).eval(tokens)
        assert np.abs(np.concatenate(logits) - straight).max() < 1e-3

    def test_more_than_the_memory_still_holds_is_refused(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        text, tail = random_tokens(2000, seed=10), random_tokens(50, seed=11)
        with open_llama(head_32, BLOCKS, n_rollback=40) as llm:
            llm.eval(text)
            straight = llm.eval(tail)
            llm.reset()
            llm.eval(text)
            assert not llm._context.seq_rm(0, 1000)
            assert llm.n_past == len(text)
            assert np.array_equal(llm.eval(tail), straight)


class TestReset:
    @pytest.mark.parametrize("cache_type", CACHE_TYPES)
    def test_a_stream_after_reset_is_bit_identical(
        self, open_llama: OpenLlama, tiny_model: TinyModel, cache_type: str
    ) -> None:
        tokens = random_tokens(700, seed=12)
        with open_llama(tiny_model, BLOCKS, cache_type=cache_type, flash_attn=True, _n_rebase=1) as llm:
            first = llm.eval(tokens)
            llm.reset()
            assert llm.n_past == 0
            assert np.array_equal(llm.eval(tokens), first)

    def test_the_same_stream_in_a_new_object_is_bit_identical(
        self, open_llama: OpenLlama, tiny_model: TinyModel
    ) -> None:
        tokens = random_tokens(700, seed=13)
        first, second = (logits_of(open_llama(tiny_model, BLOCKS), tokens) for _ in range(2))
        assert np.array_equal(first, second)


MEASURE_MEMORY = """
import json, sys
import numpy as np
import psutil
from lminf_edge import Llama, LMInfConfig

tokens = np.random.default_rng(0).integers(3, 259, 100_000)
config = LMInfConfig(n_sink=4, n_window=64, n_clamp=64, n_block=16, n_rollback=0)
llm = Llama(sys.argv[1], lminf=config, n_ubatch=64, n_threads=1, flash_attn=False)

def read_to(n_tokens):
    while llm.n_past < n_tokens:
        llm.eval(tokens[llm.n_past : min(llm.n_past + 64, n_tokens)])
    resident_bytes = psutil.Process().memory_info().rss
    return dict(n_past=llm.n_past, kv_bytes=llm.memory_stats().kv_bytes, resident_bytes=resident_bytes)

read_to(1000)  # every code path has run once
llm.reset()
print(json.dumps([read_to(100), read_to(100_000)]))
"""


def logits_of(llm: Llama, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits of a text from its beginning; closes the model."""
    with llm:
        return llm.eval(tokens)


def key_versions(
    llm: Llama, model: TinyModel, *, n_tokens: int
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Follows the cache bytes of every tenth window key of a stream, in each layer, for as long as they are stored.

    Returns:
        By layer and position, for the keys that came and went: how many different contents the key had one after
        another, and for how many tokens it was stored.
    """
    tokens = random_tokens(n_tokens, seed=4)
    followed: dict[tuple[int, int], list[bytes]] = {}
    lifetimes: dict[tuple[int, int], int] = {}
    gone: set[tuple[int, int]] = set()
    for n_past in range(5, n_tokens, 5):
        llm.eval(tokens[llm.n_past : n_past])
        for layer in range(model.shape.n_layer):
            if n_past % 10 == 0:
                followed[layer, n_past - 1] = []
        for (layer, position), contents in followed.items():
            if (layer, position) in gone:
                continue
            content = llm._context.test_get_key(layer, position)
            if content is None:
                gone.add((layer, position))
            elif not contents or contents[-1] != content:
                contents.append(content)
            lifetimes[layer, position] = n_past - position
    assert gone
    return {key: len(followed[key]) for key in gone}, {key: lifetimes[key] for key in gone}


def sink_originals(llm: Llama, model: TinyModel) -> list[bytes | None]:
    originals = [
        llm._context.test_get_sink_original(layer, sink) for layer in range(model.shape.n_layer) for sink in range(4)
    ]
    assert None not in originals
    return originals
