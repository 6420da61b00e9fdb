"""Middle tokens: what has left the window can be looked up, exactly as the reference does it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from parity import TOLERANCE, assert_close
from reference import Attention, FloatArray, Retrieval, TokenStream
from tiny_models import TinyModel, random_tokens

if TYPE_CHECKING:
    from conftest import OpenLlama
    from lminf_edge import Llama, MiddleConfig
    from reference.stream import Recall

ATTENTION = Attention(4, 16, 32, 8)
RETRIEVAL = Retrieval(k=4, distance=16)
TOKENS = random_tokens(330, seed=91)

SCHEDULE: tuple[tuple[int, Recall], ...] = ((150, False), (50, True), (20, False), (50, "gated"), (60, True))
"""Numbers of tokens, and how they recall."""

settings_of_retrieval = pytest.mark.parametrize(
    "retrieval",
    [
        RETRIEVAL,
        Retrieval(k=1, distance=1),
        Retrieval(k=16, distance=32, first_layer=1),
        Retrieval(k=5, distance=16, per="head"),
        Retrieval(k=200, distance=24, per="head"),
        Retrieval(k=7, distance=20, max_tokens=40),
        Retrieval(k=200, distance=16, max_tokens=17),
        Retrieval(k=6, distance=7),
    ],
    ids=["plain", "one", "from-layer-1", "per-head", "all-per-head", "small-store", "one-token-stored", "half-window"],
)


def config_of(retrieval: Retrieval, **options: Any) -> MiddleConfig:
    """The same as a configuration, with nothing rounded unless asked for."""
    from lminf_edge import MiddleConfig

    exact: dict[str, Any] = {"cache_type": "f32", "layers": (retrieval.first_layer, None), **options}
    return MiddleConfig(
        k=retrieval.k,
        per=retrieval.per,
        distance=retrieval.distance,
        max_tokens=retrieval.max_tokens,
        **exact,
    )


def scheduled(tokens: list[int]) -> Iterator[tuple[list[int], Recall]]:
    begin = 0
    for n_tokens, recall in SCHEDULE:
        yield tokens[begin : begin + n_tokens], recall
        begin += n_tokens


@cache
def reference_logits(model: TinyModel, retrieval: Retrieval, attention: Attention = ATTENTION) -> FloatArray:
    stream = TokenStream(model.transformer, attention, retrieval=retrieval)
    return np.concatenate([stream.eval(tokens, recall) for tokens, recall in scheduled(TOKENS)])


def eval_scheduled(llm: Llama, seq_id: int = 0) -> npt.NDArray[np.float32]:
    return np.concatenate([evaluated(llm, tokens, recall, seq_id) for tokens, recall in scheduled(TOKENS)])


def evaluated(llm: Llama, tokens: list[int], recall: Recall, seq_id: int = 0) -> npt.NDArray[np.float32]:
    """Logits of tokens given to any sequence."""
    logits = np.empty((len(tokens), llm.n_vocab), np.float32)
    llm._context.eval(np.array(tokens, np.int32), logits, seq_id, llm._recall_mode(recall))
    return logits


class TestParity:
    @settings_of_retrieval
    @pytest.mark.parametrize("n_ubatch", [1, 7, 64])
    def test_logits_equal_the_reference(
        self, open_llama: OpenLlama, head_32: TinyModel, retrieval: Retrieval, n_ubatch: int
    ) -> None:
        with open_llama(head_32, ATTENTION, n_ubatch=n_ubatch, middle=config_of(retrieval)) as llm:
            logits = np.concatenate([llm.eval(tokens, recall=recall) for tokens, recall in scheduled(TOKENS)])
        assert_close(logits, reference_logits(head_32, retrieval))

    def test_models_of_other_shapes(self, open_llama: OpenLlama, tiny_model: TinyModel) -> None:
        with open_llama(tiny_model, ATTENTION, n_ubatch=13, middle=config_of(RETRIEVAL)) as llm:
            assert_close(eval_scheduled(llm), reference_logits(tiny_model, RETRIEVAL))

    def test_recall_changes_what_is_said(self, head_32: TinyModel) -> None:
        """The other tests could not fail if it did not."""
        without = TokenStream(head_32.transformer, ATTENTION).eval(TOKENS)
        difference = np.abs(reference_logits(head_32, RETRIEVAL) - without).max(axis=1)
        assert not difference[:150].any()
        assert np.median(difference[150:200]) > 20 * TOLERANCE

    def test_more_threads_find_the_same(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        options: dict[str, Any] = {"n_ubatch": 7, "middle": config_of(RETRIEVAL), "deterministic": True}
        with open_llama(head_32, ATTENTION, **options) as one:
            expected = eval_scheduled(one)
        with open_llama(head_32, ATTENTION, n_threads_batch=3, **options) as three:
            np.testing.assert_array_equal(eval_scheduled(three), expected)

    def test_pieces_of_any_size_find_the_same(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        logits = []
        for n_ubatch in (1, 7, 64):
            options: dict[str, Any] = {"n_ubatch": n_ubatch, "middle": config_of(RETRIEVAL), "deterministic": True}
            with open_llama(head_32, ATTENTION, **options) as llm:
                logits.append(eval_scheduled(llm))
        np.testing.assert_array_equal(logits[1], logits[0])
        np.testing.assert_array_equal(logits[2], logits[0])

    def test_flash_attention(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        options: dict[str, Any] = {"cache_type": "f16", "middle": config_of(RETRIEVAL)}
        with open_llama(head_32, ATTENTION, flash_attn=True, **options) as llm:
            flash = eval_scheduled(llm)
        with open_llama(head_32, ATTENTION, flash_attn=False, **options) as llm:
            np.testing.assert_allclose(flash, eval_scheduled(llm), atol=2e-2)

    @pytest.mark.parametrize(("cache_type", "tolerance"), [("f16", 0.05), ("q8_0", 0.2)])
    def test_quantised_stores_and_caches(
        self, open_llama: OpenLlama, head_64: TinyModel, cache_type: str, tolerance: float
    ) -> None:
        retrieval = replace(RETRIEVAL, k=200)  # all of them: rounding changes no choice
        middle = config_of(retrieval, cache_type=cache_type)
        with open_llama(head_64, ATTENTION, cache_type=cache_type, flash_attn=True, middle=middle) as llm:
            logits = eval_scheduled(llm)
        # without those that were gated: rounding opens and closes gates
        assert_close(logits[:220], reference_logits(head_64, retrieval)[:220], tolerance)

    def test_q4_0_finds_much_the_same(self, open_llama: OpenLlama, head_64: TinyModel) -> None:
        retrieval = replace(RETRIEVAL, k=200)
        reference = reference_logits(head_64, retrieval)
        with open_llama(head_64, ATTENTION, middle=config_of(retrieval, cache_type="q4_0")) as llm:
            logits = eval_scheduled(llm)
        without = TokenStream(head_64.transformer, ATTENTION).eval(TOKENS)
        assert np.abs(logits - reference).mean() < 0.25 * np.abs(without[150:] - reference[150:]).mean()


class TestSequences:
    def test_tails_that_are_taken_back(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        rng = np.random.default_rng(92)
        stream = TokenStream(head_32.transformer, ATTENTION, retrieval=replace(RETRIEVAL, max_tokens=60))
        middle = config_of(replace(RETRIEVAL, max_tokens=60))
        longest = 0
        with open_llama(head_32, ATTENTION, n_ubatch=8, n_rollback=20, middle=middle) as llm:
            for _ in range(25):
                tokens = random_tokens(int(rng.integers(1, 40)), seed=int(rng.integers(1000)))
                recall = bool(rng.integers(2))
                assert_close(llm.eval(tokens, recall=recall), stream.eval(tokens, recall))
                longest = max(longest, llm.n_past)
                n_past = max(0, longest - 20, llm.n_past - int(rng.integers(21)))
                llm.truncate(n_past)
                stream.remove_tail(n_past)

    def test_what_was_forgotten_on_purpose_can_be_looked_up(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        stream = TokenStream(head_32.transformer, ATTENTION, retrieval=RETRIEVAL)
        with open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL)) as llm:
            for begin, recall in ((0, False), (100, True), (130, True)):
                tokens = TOKENS[begin : begin + 30]
                assert_close(evaluated(llm, tokens, recall), stream.eval(tokens, recall))
                assert llm._context.seq_rm(0, ATTENTION.n_sink, llm.n_past - 3)
                stream.forget(ATTENTION.n_sink, stream.n_past - 3)

    def test_cuts_far_below_what_was_forgotten(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        """What comes after such a cut was never evicted, whatever had been before."""
        for n_kept in (90, 60, 30):
            stream = TokenStream(head_32.transformer, ATTENTION, retrieval=RETRIEVAL)
            with open_llama(head_32, ATTENTION, n_rollback=8, middle=config_of(RETRIEVAL)) as llm:
                llm.eval(TOKENS[:120])
                stream.eval(TOKENS[:120])
                assert llm._context.seq_rm(0, ATTENTION.n_sink, 118)
                stream.forget(ATTENTION.n_sink, 118)
                llm.truncate(n_kept)
                stream.remove_tail(n_kept)
                assert_close(llm.eval(TOKENS[200:260]), stream.eval(TOKENS[200:260]))

    def test_every_token_is_visible_or_can_be_looked_up(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        with open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL)) as llm:
            for n_past, token in enumerate(TOKENS[:120], 1):
                llm.eval([token], recall=True)
                stats = llm.memory_stats()
                # the next query's own window has room for W - 1 of those before it
                assert stats.n_retrievable == max(0, n_past - ATTENTION.n_sink - 15)
                assert stats.n_stored == n_past

    def test_rebases(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        with open_llama(head_32, ATTENTION, n_ubatch=16, middle=config_of(RETRIEVAL), _n_rebase=1) as llm:
            logits = eval_scheduled(llm)
            assert llm.memory_stats().n_rebases >= 2
        assert_close(logits, reference_logits(head_32, RETRIEVAL))

    @pytest.mark.parametrize("position", [10_000, 2**31 - 100, 2**40 + 3])
    def test_far_from_the_beginning(self, open_llama: OpenLlama, head_32: TinyModel, position: int) -> None:
        stream = TokenStream(head_32.transformer, ATTENTION, retrieval=RETRIEVAL)
        with open_llama(head_32, ATTENTION, n_ubatch=16, middle=config_of(RETRIEVAL)) as llm:
            llm.eval(TOKENS[:50])
            assert llm._context.test_set_position(position)
            stream.eval(TOKENS[:50])
            stream.move_to(position)
            assert_close(eval_scheduled(llm), np.concatenate([stream.eval(t, r) for t, r in scheduled(TOKENS)]))
            assert min(recalled.position for recalled in llm.last_recall(1000)) >= position

    def test_many_sequences_in_one_batch(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        texts = [random_tokens(n, seed=n) for n in (120, 75, 20)]
        streams = [TokenStream(head_32.transformer, ATTENTION, retrieval=RETRIEVAL) for _ in texts]
        with open_llama(head_32, ATTENTION, n_ubatch=12, middle=config_of(RETRIEVAL), _n_seq_max=3) as llm:
            for seq_id, (text, stream) in enumerate(zip(texts, streams, strict=True)):
                assert_close(evaluated(llm, text, False, seq_id), stream.eval(text))
            more = random_tokens(30, seed=93)
            order = np.repeat(np.arange(3, dtype=np.int32), 10)
            logits = np.empty((30, llm.n_vocab), np.float32)
            llm._context.eval_batch(np.array(more, np.int32), order, logits, recall=1)
            for seq_id, stream in enumerate(streams):
                part = slice(10 * seq_id, 10 * seq_id + 10)
                assert_close(logits[part], stream.eval(more[part], True))

    def test_a_copied_sequence_takes_its_store_along(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        stream = TokenStream(head_32.transformer, ATTENTION, retrieval=RETRIEVAL)
        with open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL), _n_seq_max=2) as llm:
            evaluated(llm, TOKENS[:100], False)
            stream.eval(TOKENS[:100])
            llm._context.seq_cp(0, 1)
            llm._context.seq_rm(0)
            assert_close(evaluated(llm, TOKENS[100:140], True, 1), stream.eval(TOKENS[100:140], True))

    def test_a_sequence_begun_anew_remembers_nothing(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        with open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL)) as llm:
            llm.eval(random_tokens(200, seed=94))
            llm.reset()
            assert llm.memory_stats().n_stored == 0
            assert_close(eval_scheduled(llm), reference_logits(head_32, RETRIEVAL))


class TestSavedStates:
    def test_a_saved_sequence_goes_on_bit_for_bit(
        self, open_llama: OpenLlama, head_32: TinyModel, tmp_path: Path
    ) -> None:
        middle = config_of(replace(RETRIEVAL, max_tokens=60), cache_type="q8_0")
        with open_llama(head_32, ATTENTION, n_ubatch=16, middle=middle) as llm:
            llm.eval(TOKENS[:200])
            llm.save_state(tmp_path / "state")
            expected = llm.eval(TOKENS[200:240], recall=True)
        with open_llama(head_32, ATTENTION, n_ubatch=16, middle=middle) as other:
            other.eval(TOKENS[50:90])
            other.load_state(tmp_path / "state")
            np.testing.assert_array_equal(other.eval(TOKENS[200:240], recall=True), expected)

    def test_a_store_in_a_file_is_opened_again(self, open_llama: OpenLlama, head_32: TinyModel, tmp_path: Path) -> None:
        middle = config_of(RETRIEVAL, path=tmp_path / "store")
        with open_llama(head_32, ATTENTION, middle=middle) as llm:
            llm.eval(TOKENS[:200])
            llm.save_state(tmp_path / "state")
            expected = llm.eval(TOKENS[200:240], recall=True)
            llm.eval(TOKENS[:50])  # written behind what was saved
        assert (tmp_path / "state").stat().st_size < (tmp_path / "store").stat().st_blocks * 512
        with open_llama(head_32, ATTENTION, middle=middle) as other:
            other.load_state(tmp_path / "state")
            np.testing.assert_array_equal(other.eval(TOKENS[200:240], recall=True), expected)

    def test_a_state_never_takes_later_rows_for_its_own(
        self, open_llama: OpenLlama, head_32: TinyModel, tmp_path: Path
    ) -> None:
        from lminf_edge import StateError

        middle = config_of(replace(RETRIEVAL, max_tokens=60), path=tmp_path / "store")
        with open_llama(head_32, ATTENTION, n_ubatch=8, middle=middle) as llm:
            llm.eval(TOKENS[:100])
            llm.save_state(tmp_path / "state")
            llm.eval(TOKENS[100:200])  # the ring comes round
            with pytest.raises(StateError, match="has changed since"):
                llm.load_state(tmp_path / "state")
            assert llm.n_past == 200  # nothing was changed

    def test_another_store_is_refused(self, open_llama: OpenLlama, head_32: TinyModel, tmp_path: Path) -> None:
        from lminf_edge import StateError

        with open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL, path=tmp_path / "one")) as llm:
            llm.eval(TOKENS[:100])
            llm.save_state(tmp_path / "state")
        for path in (tmp_path / "two", None):
            with (
                open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL, path=path)) as other,
                pytest.raises(StateError, match="another store"),
            ):
                other.load_state(tmp_path / "state")

    def test_a_file_that_is_no_store_is_left_alone(
        self, open_llama: OpenLlama, head_32: TinyModel, tmp_path: Path
    ) -> None:
        from lminf_edge import ContextError

        file = tmp_path / "notes.txt"
        file.write_text("mine")
        with pytest.raises(ContextError, match="no store of middle tokens"):
            open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL, path=file))
        assert file.read_text() == "mine"

    def test_a_store_has_one_user(self, open_llama: OpenLlama, head_32: TinyModel, tmp_path: Path) -> None:
        from lminf_edge import ContextError

        middle = config_of(RETRIEVAL, path=tmp_path / "store")
        with open_llama(head_32, ATTENTION, middle=middle), pytest.raises(ContextError, match="in use"):
            open_llama(head_32, ATTENTION, middle=middle)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
    def test_a_forked_child_does_not_keep_its_parent_from_a_store(self, head_32: TinyModel, tmp_path: Path) -> None:
        """A file's lock is inherited; and a child that closes what it inherited takes nothing from its parent."""
        command = [sys.executable, "-c", FORKED_STORE, str(head_32.path), str(tmp_path / "store")]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert finished.stdout.splitlines() == ["in use while the parent has it", "opened again"], finished.stderr


FORKED_STORE = """
import os, signal, sys
from lminf_edge import ContextError, Llama, LMInfConfig, MiddleConfig

def opened():
    middle = MiddleConfig(k=4, layers=(0, None), max_tokens=200, path=sys.argv[2])
    return Llama(sys.argv[1], lminf=LMInfConfig(n_window=32, middle=middle), n_threads=1)

def say(text):
    os.write(1, text.encode() + bytes([10]))

llm = opened()
reader, writer = os.pipe()
closing = os.fork()
if closing == 0:
    llm.close()
    try:
        opened()
    except ContextError as error:
        say("in use while the parent has it" if "in use" in str(error) else str(error))
    os.write(writer, b".")
    signal.pause()
bystander = os.fork()
if bystander == 0:
    signal.pause()
try:
    os.read(reader, 1)
    llm.close()
    opened().close()
    say("opened again")
finally:
    for child in (closing, bystander):
        os.kill(child, signal.SIGKILL)
"""


class TestOptions:
    def test_without_a_store_there_is_nothing_to_recall(self, tiny: Llama) -> None:
        with pytest.raises(ValueError, match="MiddleConfig"):
            tiny.eval([5], recall=True)
        with pytest.raises(ValueError, match="recall"):
            tiny.eval([5], recall="yes")  # type: ignore[arg-type]
        assert tiny.n_past == 0

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"k": 0}, "k = 0"),
            ({"k": 257}, "k = 257"),
            ({"per": "layer"}, "per"),
            ({"distance": 0}, "distance"),
            ({"layers": (4, 4)}, "layers"),
            ({"layers": 3}, "layers"),
            ({"cache_type": "q5_1"}, "cache_type"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"path": ""}, "path"),
        ],
    )
    def test_wrong_values_are_named(self, options: dict[str, Any], named: str) -> None:
        from lminf_edge import ConfigError, MiddleConfig

        with pytest.raises(ConfigError, match=named):
            MiddleConfig(**options)

    @pytest.mark.parametrize(("options", "named"), [({"layers": (0, 3)}, "layers"), ({"layers": (2, None)}, "layers")])
    def test_values_that_do_not_fit_the_model_are_named(
        self, open_llama: OpenLlama, head_32: TinyModel, options: dict[str, Any], named: str
    ) -> None:
        from lminf_edge import ConfigError

        with pytest.raises(ConfigError, match=named):
            open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL, **options))

    def test_a_store_that_does_not_fit_is_refused_when_it_is_made(
        self, open_llama: OpenLlama, head_32: TinyModel, tmp_path: Path
    ) -> None:
        """Not when its rows are written, one by one, by the system that ends the process."""
        from lminf_edge import ConfigError

        huge, file = replace(RETRIEVAL, max_tokens=2**28), tmp_path / "store"
        n_bytes = 64 * 2**28 * 2 * 2 * 2 * 32 * 4  # sequences, tokens, layers, heads, key and value, components
        for path, expected in (
            (None, "bytes of memory, and .* are available: keep it in a file .* fewer tokens"),
            (file, "bytes of the disk of .*/store, and .* are available: store fewer tokens"),
        ):
            with pytest.raises(ConfigError, match=rf"needs \d+ {expected}") as refusal:
                open_llama(head_32, ATTENTION, middle=config_of(huge, path=path), _n_seq_max=64)
            message = str(refusal.value).replace(str(file), "")
            needed, available = (int(number) for number in re.findall(r"\d+", message)[:2])
            assert n_bytes <= needed < 1.01 * n_bytes
            assert 0 < available < needed
        assert not file.exists()

    def test_what_a_store_can_take_is_told(self, open_llama: OpenLlama, head_32: TinyModel, tmp_path: Path) -> None:
        middle = config_of(RETRIEVAL, path=tmp_path / "store")
        with open_llama(head_32, ATTENTION, middle=middle, _n_seq_max=2) as llm:
            assert llm._context.middle_stats().n_bytes_full == (tmp_path / "store").stat().st_size
        with open_llama(head_32, ATTENTION) as llm:
            assert llm._context.middle_stats().n_bytes_full == 0

    def test_values_that_do_not_fit_the_window_are_named(self) -> None:
        from lminf_edge import ConfigError, LMInfConfig, MiddleConfig

        with pytest.raises(ConfigError, match="max_tokens"):
            LMInfConfig(n_window=64, middle=MiddleConfig(max_tokens=64))
        with pytest.raises(ConfigError, match="distance"):
            LMInfConfig(n_window=64, middle=MiddleConfig(distance=65))

    def test_the_configuration_in_use(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        middle = replace(config_of(RETRIEVAL), distance=None)
        with open_llama(head_32, ATTENTION, middle=middle) as llm:
            assert llm.config is not None and llm.config.middle is not None
            assert llm.config.middle.distance == 16  # half of n_clamp
            assert llm.config.middle.layers == (0, 2)


class TestRecords:
    def test_what_was_looked_up_is_told(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        with open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL)) as llm:
            llm.eval(TOKENS[:100])
            assert llm.last_recall() == ()
            llm.eval(TOKENS[100:110], recall=True)
            found = llm.last_recall(1000)
            # k for each KV head and layer; two layers with two KV heads
            assert RETRIEVAL.k <= len(found) <= 4 * RETRIEVAL.k
            assert all(ATTENTION.n_sink <= token.position <= 109 - 16 for token in found)
            assert [token.token for token in found] == [TOKENS[token.position] for token in found]
            assert [token.weight for token in found] == sorted((token.weight for token in found), reverse=True)
            assert 0 < sum(token.weight for token in found) < 8  # two layers with four query heads
            llm.eval(TOKENS[110:111])
            assert llm.last_recall() == ()

    def test_steps_tell_it_when_asked(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        with open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL)) as llm:
            llm.eval(TOKENS[:100])
            steps = list(llm.generate(TOKENS[100:105], max_tokens=3, recall=True, show_recall=True, stop_at_end=False))
            assert all(step.recall and step.recall[0].text is not None for step in steps)
            assert not any(step.recall for step in llm.generate(max_tokens=2, recall=True, stop_at_end=False))

    def test_memory(self, open_llama: OpenLlama, head_32: TinyModel) -> None:
        with open_llama(head_32, ATTENTION, middle=config_of(RETRIEVAL, cache_type="q8_0")) as llm:
            llm.eval(TOKENS[:100])
            before = llm.memory_stats()
            # two layers, two KV heads, a key and a value of 34 bytes for 32 components
            assert before.store_bytes == 100 * 2 * 2 * 2 * 34
            assert before.scan_seconds == 0
            llm.eval(TOKENS[100:110], recall=True)
            assert llm.memory_stats().scan_seconds > 0


class TestRealModel:
    FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    QUESTION = " What is the pass key? The pass key is"

    def test_a_pass_key_outside_the_window_is_found(self, default_model: Path) -> None:
        from lminf_edge import Llama, LMInfConfig, MiddleConfig

        text = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
            + 5 * self.FILLER
            + " The pass key is 71432. Remember it. 71432 is the pass key."
            + 30 * self.FILLER
        )
        config = LMInfConfig(n_sink=16, n_window=256, middle=MiddleConfig())
        with Llama(default_model, lminf=config, n_threads=1, seed=0) as llm:
            answers: dict[bool, str] = {}
            llm.eval(llm.tokenize(text))
            n_past = llm.n_past
            for recall in (False, True):
                steps = llm.generate(self.QUESTION, max_tokens=6, temperature=0, recall=recall)
                answers[recall] = "".join(step.text for step in steps)
                llm.truncate(n_past)
        assert n_past > 700
        assert "71432" in answers[True]
        assert "71432" not in answers[False]

    def test_storing_changes_nothing(self, default_model: Path) -> None:
        from lminf_edge import Llama, LMInfConfig, MiddleConfig

        logprobs = {}
        for middle in (None, MiddleConfig()):
            config = LMInfConfig(n_window=64, middle=middle)
            with Llama(default_model, lminf=config, n_threads=1, seed=0) as llm:
                logprobs[middle] = llm.logprobs(llm.tokenize(12 * self.FILLER))
        without, with_store = logprobs.values()
        np.testing.assert_array_equal(without, with_store)
