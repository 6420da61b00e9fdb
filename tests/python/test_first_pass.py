"""Middle tokens by a first pass: few keys are multiplied exactly, those that their sketches look best for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parity import TOLERANCE
from reference import Attention, Retrieval
from test_middle import config_of, evaluated
from tiny_models import TinyModel, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from conftest import OpenLlama
    from lminf_edge import Llama

ATTENTION = Attention(4, 16, 32, 8)
RETRIEVAL = Retrieval(k=4, distance=16, max_tokens=900)
READ = random_tokens(700, seed=95)
ASKED = random_tokens(40, seed=96)
NEARLY_ALL = 660
"""Of the 684 keys that the first token asked can recall."""


def answers(llm: Llama, seq_id: int = 0) -> npt.NDArray[np.float32]:
    evaluated(llm, READ, False, seq_id)
    return evaluated(llm, ASKED, True, seq_id)


class TestCandidates:
    @pytest.mark.parametrize("per", ["kv_head", "head"])
    @pytest.mark.parametrize("n_ubatch", [1, 16])
    def test_with_nearly_all_keys_nothing_is_missed(
        self, open_llama: OpenLlama, tiny_model: TinyModel, per: Any, n_ubatch: int
    ) -> None:
        retrieval = replace(RETRIEVAL, per=per)
        with open_llama(tiny_model, ATTENTION, n_ubatch=n_ubatch, middle=config_of(retrieval)) as llm:
            exact = answers(llm)
        middle = config_of(retrieval, n_candidates=NEARLY_ALL)
        with open_llama(tiny_model, ATTENTION, n_ubatch=n_ubatch, middle=middle) as llm:
            np.testing.assert_allclose(answers(llm), exact, atol=TOLERANCE)

    def test_few_keys_hold_most_of_the_best(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        shares = []
        for n_candidates in (4, 64, 256):
            with open_llama(head_64, ATTENTION, middle=config_of(RETRIEVAL, n_candidates=n_candidates)) as llm:
                llm._context.test_check_candidates(True)
                answers(llm)
                n_recalled, n_found = llm._context.test_get_candidates()
                # each token asked, in two layers with three KV heads
                assert n_recalled == len(ASKED) * 6 * RETRIEVAL.k
                shares.append(n_found / n_recalled)
        assert shares == sorted(shares)
        assert 0.1 < shares[0] < 0.9
        assert shares[2] > 0.97

    def test_checking_looks_at_all_keys(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        with open_llama(head_64, ATTENTION, middle=config_of(RETRIEVAL)) as llm:
            exact = answers(llm)
        with open_llama(head_64, ATTENTION, middle=config_of(RETRIEVAL, n_candidates=4)) as llm:
            rough = answers(llm)
            llm.reset()
            llm._context.test_check_candidates(True)
            checked = answers(llm)
        np.testing.assert_allclose(checked, exact, atol=1e-5)
        assert np.abs(rough - exact).max() > 1e-2

    def test_short_texts_are_looked_through_exactly(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        """There is no mean of all keys yet, or there are no more keys than candidates."""
        for n_read, n_candidates in ((240, 4), (400, 500)):
            logits = []
            for middle in (config_of(RETRIEVAL), config_of(RETRIEVAL, n_candidates=n_candidates)):
                with open_llama(head_64, ATTENTION, n_ubatch=16, middle=middle) as llm:
                    llm.eval(READ[:n_read])
                    logits.append(llm.eval(ASKED[:10], recall=True))
            np.testing.assert_array_equal(logits[0], logits[1])

    def test_old_keys_are_forgotten(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        """The ring of slots has come round."""
        retrieval = replace(RETRIEVAL, max_tokens=300)
        logits = []
        for middle in (config_of(retrieval), config_of(retrieval, n_candidates=280)):
            with open_llama(head_64, ATTENTION, middle=middle) as llm:
                logits.append(answers(llm))
        np.testing.assert_allclose(logits[0], logits[1], atol=TOLERANCE)

    def test_more_threads_find_no_less(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        middle = config_of(RETRIEVAL, n_candidates=NEARLY_ALL)
        logits = []
        for n_threads in (1, 3):
            with open_llama(head_64, ATTENTION, n_ubatch=7, middle=middle, n_threads_batch=n_threads) as llm:
                logits.append(answers(llm))
        np.testing.assert_allclose(logits[0], logits[1], atol=TOLERANCE)

    @pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
    def test_quantised_stores(self, open_llama: OpenLlama, head_64: TinyModel, cache_type: str) -> None:
        logits = []
        for n_candidates in (None, NEARLY_ALL):
            middle = config_of(RETRIEVAL, cache_type=cache_type, n_candidates=n_candidates)
            with open_llama(head_64, ATTENTION, middle=middle) as llm:
                logits.append(answers(llm))
        np.testing.assert_allclose(logits[0], logits[1], atol=TOLERANCE)


class TestStates:
    @pytest.mark.parametrize("in_file", [False, True])
    def test_sketches_are_saved(self, open_llama: OpenLlama, head_64: TinyModel, tmp_path: Path, in_file: bool) -> None:
        middle = config_of(RETRIEVAL, n_candidates=8, path=tmp_path / "store" if in_file else None)
        with open_llama(head_64, ATTENTION, middle=middle) as llm:
            llm.eval(READ)
            llm.save_state(tmp_path / "state")
            expected = llm.eval(ASKED, recall=True)
        with open_llama(head_64, ATTENTION, middle=middle) as other:
            if not in_file:
                other.eval(random_tokens(300, seed=97))  # another mean
            other.load_state(tmp_path / "state")
            np.testing.assert_array_equal(other.eval(ASKED, recall=True), expected)

    def test_a_state_from_before_there_was_a_mean(
        self, open_llama: OpenLlama, head_64: TinyModel, tmp_path: Path
    ) -> None:
        """In a file, where it has been found since."""
        middle = config_of(RETRIEVAL, n_candidates=NEARLY_ALL, path=tmp_path / "store")
        with open_llama(head_64, ATTENTION, middle=middle) as llm:
            llm.eval(READ[:200])
            llm.save_state(tmp_path / "state")
            llm.eval(READ[200:])
            expected = llm.eval(ASKED, recall=True)
        with open_llama(head_64, ATTENTION, middle=middle) as other:
            other.load_state(tmp_path / "state")
            other.eval(READ[200:])
            np.testing.assert_allclose(other.eval(ASKED, recall=True), expected, atol=TOLERANCE)

    def test_a_store_without_sketches_is_another_one(
        self, open_llama: OpenLlama, head_64: TinyModel, tmp_path: Path
    ) -> None:
        from lminf_edge import ContextError

        with open_llama(head_64, ATTENTION, middle=config_of(RETRIEVAL, path=tmp_path / "store")) as llm:
            llm.eval(READ)
        with pytest.raises(ContextError, match="no store of middle tokens with these parameters"):
            open_llama(head_64, ATTENTION, middle=config_of(RETRIEVAL, path=tmp_path / "store", n_candidates=8))

    def test_copied_sequences_take_sketches_along(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        middle = config_of(RETRIEVAL, n_candidates=8)
        with open_llama(head_64, ATTENTION, middle=middle, _n_seq_max=2) as llm:
            evaluated(llm, READ, False)
            llm._context.seq_cp(0, 1)
            expected = evaluated(llm, ASKED, True)
            np.testing.assert_array_equal(evaluated(llm, ASKED, True, 1), expected)

    def test_memory(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        with open_llama(head_64, ATTENTION, middle=config_of(RETRIEVAL, cache_type="q8_0", n_candidates=8)) as llm:
            llm.eval(READ[:100])
            # two layers, three KV heads, a key and a value of 68 bytes for 64 components, a sketch of 8 and its factor
            assert llm.memory_stats().store_bytes == 100 * 2 * 3 * (2 * 68 + 8 + 2)


class TestErrors:
    @pytest.mark.parametrize("n_candidates", [3, 65537, 1.5])
    def test_wrong_numbers_are_named(self, n_candidates: Any) -> None:
        from lminf_edge import ConfigError, MiddleConfig

        with pytest.raises(ConfigError, match="n_candidates"):
            MiddleConfig(k=4, n_candidates=n_candidates)

    def test_nothing_to_check(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        from lminf_edge import ContextError

        with (
            open_llama(head_64, ATTENTION, middle=config_of(RETRIEVAL)) as llm,
            pytest.raises(ContextError, match="candidates"),
        ):
            llm._context.test_check_candidates(True)


_ON_A_SMALL_DISK = """
import os
import sys
from lminf_edge import ContextError, Llama, LMInfConfig, MiddleConfig
model, store = sys.argv[1:]
middle = MiddleConfig(k=4, layers=(0, None), cache_type="f32", max_tokens=100_000, path=store)
window = LMInfConfig(n_window=64, middle=middle)
with Llama(model, lminf=window, n_threads=1) as llm, open(store + ".other", "wb") as other:
    disk = os.statvfs(store)  # there was room for all of the store; somebody else takes most of it
    os.posix_fallocate(other.fileno(), 0, disk.f_bavail * disk.f_frsize - 24_000_000)
    try:
        while True:
            llm.eval([5] * 500)
    except ContextError as error:
        n_past = llm.n_past
        print(n_past, error)
    llm.truncate(n_past - 8)
    llm.eval([6] * 8)
    assert llm.n_past == n_past
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk")
def test_a_full_disk_is_an_error(head_64: TinyModel, tmp_path: Path) -> None:
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=400m none {tmp_path}"
    try:
        if subprocess.run([*inside, mount], capture_output=True, check=False).returncode != 0:
            pytest.skip("this user may not mount anything")
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    command = f'{mount} && exec "$0" -c "$1" "$2" "$3"'
    result = subprocess.run(
        [*inside, command, sys.executable, _ON_A_SMALL_DISK, str(head_64.path), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    n_past, _, reason = result.stdout.partition(" ")
    assert int(n_past) > 4000
    assert "cannot grow" in reason and "No space left" in reason
