"""`Llama` does what its documentation says: on tiny random models or on the default model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import lminf_edge
from lminf_edge import ContextError, GenerationStep, Llama, LMInfConfig, StateError
from lminf_edge._library import _core
from tiny_models import N_VOCAB, TinyModel, random_tokens

WINDOW = LMInfConfig(n_sink=4, n_window=32, n_rollback=0)


@pytest.fixture
def tiny(head_32: TinyModel) -> Iterator[Llama]:
    """A tiny model with a window of 32 and nothing rounded."""
    exact: Any = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": False}
    with Llama(head_32.path, lminf=WINDOW, n_ubatch=16, n_threads=1, seed=0, **exact) as llm:
        yield llm


@pytest.fixture(scope="module")
def real_model(default_model: Path) -> Iterator[Llama]:
    """The default model with a window of 128."""
    with Llama(default_model, lminf=LMInfConfig(n_window=128), seed=0) as llm:
        yield llm


@pytest.fixture
def real(real_model: Llama) -> Llama:
    """The default model at the beginning of a sequence."""
    real_model.reset()
    return real_model


# --- text


@pytest.mark.parametrize("text", ["Hello, world!", "  two  spaces\n\ttab", "Größe 東京 🦙🏔️", ""])
def test_text_goes_into_tokens_and_comes_back(real: Llama, text: str) -> None:
    tokens = real.tokenize(text)
    assert all(isinstance(token, int) for token in tokens)
    assert real.detokenize(tokens) == text
    assert real.tokenize(text.encode()) == tokens


def test_bytes_that_are_no_text_are_kept(tiny: Llama) -> None:
    llama = "🦙".encode()
    tokens = tiny.tokenize(llama)
    assert tiny.detokenize_bytes(tokens) == llama
    assert tiny.detokenize_bytes(tokens[:2]) == llama[:2]
    assert tiny.detokenize(tokens[:2]) == "\ufffd"


def test_special_tokens_are_recognised_and_spelled_on_request_only(real: Llama) -> None:
    assert len(real.tokenize("<|im_end|>", special=True)) == 1
    assert len(real.tokenize("<|im_end|>")) > 1
    token = real.tokenize("<|im_end|>", special=True)
    assert real.detokenize(token) == ""
    assert real.detokenize(token, special=True) == "<|im_end|>"


# --- eval and logprobs


def test_eval_returns_a_row_of_logits_for_each_token(tiny: Llama) -> None:
    logits = tiny.eval(random_tokens(100, seed=1))
    assert logits.shape == (100, N_VOCAB)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


def test_logprobs_are_the_log_softmax_of_the_logits(tiny: Llama) -> None:
    tokens = random_tokens(100, seed=1)
    logits = tiny.eval(tokens)
    tiny.reset()
    logprobs = tiny.logprobs(tokens)
    assert logprobs.shape == (99,)
    assert logprobs.dtype == np.float32
    np.testing.assert_allclose(logprobs, log_softmax(logits)[np.arange(99), tokens[1:]], atol=1e-5)


def test_logprobs_by_micro_batch_are_the_same(tiny: Llama) -> None:
    tokens = random_tokens(100, seed=1)
    whole = tiny.logprobs(tokens)
    tiny.reset()
    pieces = list(tiny.iter_logprobs(tokens))
    assert [piece.size for piece in pieces] == [16] * 6 + [3]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_logprobs_of_one_token_are_none_and_the_token_is_appended(tiny: Llama) -> None:
    assert tiny.logprobs([5]).shape == (0,)
    assert tiny.n_past == 1


def test_calls_continue_the_sequence_and_reset_ends_it(tiny: Llama) -> None:
    tokens = random_tokens(50, seed=1)
    whole = tiny.eval(tokens)
    tiny.reset()
    assert tiny.n_past == 0
    tiny.logprobs(tokens[:20])
    assert tiny.n_past == 20
    np.testing.assert_array_equal(tiny.eval(tokens[20:]), whole[20:])
    assert tiny.n_past == 50


def test_tokens_may_be_any_sequence_of_integers(tiny: Llama) -> None:
    expected = tiny.eval([5, 6, 7])
    for tokens in ((5, 6, 7), range(5, 8), np.array([5, 6, 7]), np.array([5, 0, 6, 0, 7], np.uint8)[::2]):
        tiny.reset()
        np.testing.assert_array_equal(tiny.eval(tokens), expected)


# --- generate


def draw(llm: Llama, prompt: str, **options: Any) -> list[int]:
    """The tokens that a fresh sequence goes on with."""
    llm.reset()
    return [step.token for step in llm.generate(prompt, stop_at_end=False, **options)]


def test_a_seed_makes_generation_repeatable(tiny: Llama) -> None:
    assert draw(tiny, "abc", max_tokens=30, seed=7) == draw(tiny, "abc", max_tokens=30, seed=7)
    assert draw(tiny, "abc", max_tokens=30, seed=7) != draw(tiny, "abc", max_tokens=30, seed=8)


def test_the_object_s_seed_makes_a_series_of_calls_repeatable(head_32: TinyModel) -> None:
    def series() -> list[list[int]]:
        with Llama(head_32.path, lminf=WINDOW, n_threads=1, seed=3) as llm:
            return [draw(llm, "abc", max_tokens=20) for _ in range(3)]

    first = series()
    assert first == series()
    assert first[0] != first[1]


def test_temperature_zero_takes_the_most_probable_token(tiny: Llama) -> None:
    steps = list(tiny.generate("abc", temperature=0, max_tokens=20, stop_at_end=False))
    prompt = tiny.tokenize("abc")
    tiny.reset()
    logits = tiny.eval(prompt + [step.token for step in steps])
    chosen = logits[len(prompt) - 1 : -1]
    assert [step.token for step in steps] == chosen.argmax(axis=1).tolist()
    np.testing.assert_allclose([step.logprob for step in steps], log_softmax(chosen).max(axis=1), atol=1e-4)


OPEN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "seed": 5, "max_tokens": 20}


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0.0}])
def test_a_sampling_option_at_its_limit_leaves_one_token(tiny: Llama, narrow: dict[str, float]) -> None:
    greedy = draw(tiny, "abc", temperature=0, max_tokens=20)
    assert draw(tiny, "abc", **OPEN) != greedy
    assert draw(tiny, "abc", **OPEN | narrow) == greedy


@pytest.mark.parametrize("penalty", [{"repeat_penalty": 5.0}, {"frequency_penalty": 10.0}, {"presence_penalty": 20.0}])
def test_a_penalty_makes_a_text_repeat_itself_less(real: Llama, penalty: dict[str, float]) -> None:
    prompt = "one two one two one two one two"
    repeating = draw(real, prompt, temperature=0, max_tokens=24)
    penalised = draw(real, prompt, temperature=0, max_tokens=24, **penalty)
    assert len(set(penalised)) > 2 * len(set(repeating))
    assert draw(real, prompt, temperature=0, max_tokens=24, penalty_last_n=0, **penalty) == repeating


def test_the_text_of_the_steps_is_the_text_of_the_tokens(tiny: Llama) -> None:
    # a random model draws random bytes: most are parts of characters, and many of no character
    steps = list(tiny.generate("abc", temperature=2.0, top_k=0, min_p=0.0, max_tokens=200, stop_at_end=False, seed=1))
    data = tiny.detokenize_bytes([step.token for step in steps])
    assert "".join(step.text for step in steps) == data.decode(errors="replace")


def test_a_character_arrives_whole(real: Llama) -> None:
    emoji = real.tokenize("🏔")
    assert len(emoji) > 1
    steps = list(real.generate("🦙🏔" * 8 + "🦙", temperature=0, max_tokens=2 * len(emoji)))
    assert "🏔" in [step.text for step in steps]
    assert "\ufffd" not in "".join(step.text for step in steps[:-1])


def test_steps_count_positions_and_the_last_one_says_why_it_is_the_last(tiny: Llama) -> None:
    prompt = tiny.tokenize("abc")
    steps = list(tiny.generate(prompt, max_tokens=5, stop_at_end=False))
    assert all(isinstance(step, GenerationStep) for step in steps)
    assert [step.n_past for step in steps] == [len(prompt) + i for i in range(1, 6)]
    assert [step.finish_reason for step in steps] == [None] * 4 + ["length"]
    assert all(step.tokens_per_second > 0 and step.logprob <= 0 for step in steps)
    assert tiny.n_past == len(prompt) + 5


def test_generation_stops_where_the_model_ends_its_answer(real: Llama) -> None:
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    *answer, end = real.generate(real.tokenize(question, special=True), temperature=0, max_tokens=60)
    assert end.finish_reason == "stop"
    assert real.detokenize([end.token], special=True) == "<|im_end|>"
    assert "Paris" in "".join(step.text for step in answer)
    assert end.text == ""
    assert end.n_past == answer[-1].n_past == real.n_past


def test_an_empty_prompt_goes_on_after_the_last_token(tiny: Llama) -> None:
    whole = draw(tiny, "abc", temperature=0, max_tokens=20)
    assert draw(tiny, "abc", temperature=0, max_tokens=8) == whole[:8]
    assert [step.token for step in tiny.generate(temperature=0, max_tokens=12, stop_at_end=False)] == whole[8:]


def test_a_prompt_longer_than_the_window_is_read_through(tiny: Llama) -> None:
    (step,) = tiny.generate(random_tokens(500, seed=2), max_tokens=1, stop_at_end=False)
    assert step.n_past == 501


def test_generation_without_end_is_possible_and_can_be_left(tiny: Llama) -> None:
    endless = tiny.generate("abc", max_tokens=-1, stop_at_end=False)
    assert len(list(itertools.islice(endless, 300))) == 300
    assert tiny.n_past == 3 + 300
    tiny.eval([5])


def test_nothing_is_read_when_an_option_is_wrong(tiny: Llama) -> None:
    with pytest.raises(ValueError, match="top_p"):
        tiny.generate("abc", top_p=2.0)
    assert tiny.n_past == 0


# --- memory and state


def test_memory_stats_tell_where_the_sequence_stands(tiny: Llama) -> None:
    empty = tiny.memory_stats()
    tiny.eval(random_tokens(500, seed=3))
    stats = tiny.memory_stats()
    assert stats.n_past == 500
    assert stats.kv_bytes == empty.kv_bytes > 0
    assert stats.n_cells == empty.n_cells >= stats.n_cells_used > 0
    assert 0 < stats.n_evicted <= 500 - 4 - 32
    assert stats.sink_distance is not None and stats.sink_distance <= 32
    assert stats.n_placements == 0  # attention of our own rotates queries instead
    assert stats.resident_bytes > 0
    assert stats.peak_resident_bytes is None or stats.peak_resident_bytes >= 0.9 * stats.resident_bytes
    assert (empty.window_fill, stats.window_fill) == (0, 1)
    assert empty.tokens_per_second is empty.latency_p50 is empty.latency_p99 is None


def test_memory_stats_tell_how_long_tokens_took(tiny: Llama) -> None:
    for _ in tiny.generate([5, 6, 7], max_tokens=50, stop_at_end=False):
        time.sleep(0.002)  # the caller's time does not count
    stats = tiny.memory_stats()
    assert stats.latency_p50 is not None and stats.latency_p99 is not None and stats.tokens_per_second is not None
    assert 0 < stats.latency_p50 <= stats.latency_p99
    assert stats.latency_p50 < 1 < stats.tokens_per_second


def test_a_plain_context_fills_up(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_threads=1) as llm:
        llm.eval(random_tokens(64, seed=3))
        assert llm.memory_stats().window_fill == 64 / 256


def test_a_model_without_sink_tokens_has_no_sink_distance(head_32: TinyModel) -> None:
    with Llama(head_32.path, lminf=LMInfConfig(n_sink=0, n_window=32), n_threads=1) as llm:
        llm.eval(random_tokens(100, seed=3))
        assert llm.memory_stats().sink_distance is None


def test_the_configuration_in_use_has_every_default_filled_in(real: Llama) -> None:
    assert real.config == LMInfConfig(n_sink=4, n_window=128, n_clamp=128, n_block=64, n_rollback=128)
    assert real.n_ctx is None


def test_the_default_window_is_2048_at_most_the_trained_length(default_model: Path, head_32: TinyModel) -> None:
    for path, expected in ((default_model, 2048), (head_32.path, head_32.shape.n_ctx_train)):
        with Llama(path, lminf=LMInfConfig()) as llm:
            assert llm.config is not None
            assert llm.config.n_window == expected


def test_the_model_describes_itself(real: Llama) -> None:
    assert real.n_ctx_train == 8192
    assert real.n_vocab == 49152
    assert real.metadata["general.architecture"] == "llama"
    assert "Q4_1" in real.description
    assert "im_start" in (real.chat_template or "")


def test_plain_llama_cpp_says_that_its_context_is_full_and_changes_nothing(head_32: TinyModel) -> None:
    with Llama(head_32.path, n_ctx=256, n_threads=1) as llm:
        assert llm.config is None
        assert llm.n_ctx == 256
        llm.eval(random_tokens(250, seed=4))
        for call in (llm.eval, llm.logprobs, llm.generate):
            with pytest.raises(ContextError, match="context is full: 250 of 256"):
                call([5] * 7)
            assert llm.n_past == 250
        with pytest.raises(ContextError):
            list(llm.generate([5], max_tokens=10, stop_at_end=False))
        assert llm.n_past == 256
        llm.reset()
        llm.eval([5])


def test_a_closed_object_refuses_everything_but_closing(head_32: TinyModel) -> None:
    llm = Llama(head_32.path, lminf=WINDOW, n_threads=1)
    steps = llm.generate("abc", max_tokens=5, stop_at_end=False)
    next(steps)
    llm.close()
    llm.close()
    for call in (
        lambda: llm.eval([5]),
        lambda: llm.logprobs([5]),
        lambda: llm.generate("abc"),
        lambda: next(steps),
        lambda: llm.tokenize("abc"),
        lambda: llm.detokenize([5]),
        lambda: llm.n_past,
        lambda: llm.metadata,
        llm.reset,
        llm.memory_stats,
        llm.__enter__,
    ):
        with pytest.raises(StateError, match="closed"):
            call()


def test_a_with_block_closes(head_32: TinyModel) -> None:
    with Llama(head_32.path, lminf=WINDOW, n_threads=1) as llm:
        llm.eval([5])
    with pytest.raises(StateError):
        llm.eval([5])


# --- loading and library


def test_loading_reports_progress(default_model: Path) -> None:
    fractions: list[float] = []
    Llama(default_model, lminf=WINDOW, progress=fractions.append).close()
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0.0
    assert fractions[-1] == pytest.approx(1.0)


def test_loading_stops_when_the_progress_callable_raises(default_model: Path) -> None:
    def interrupt(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Llama(default_model, lminf=WINDOW, progress=interrupt)


@pytest.mark.parametrize("verbose", [False, True])
def test_llama_cpp_s_log_is_shown_on_request_only(
    head_32: TinyModel, capfd: pytest.CaptureFixture[str], verbose: bool
) -> None:
    Llama(head_32.path, lminf=WINDOW, verbose=verbose).close()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("llama_model_loader" in shown.err) is verbose
    assert verbose or shown.err == ""


def test_the_package_tells_where_its_libraries_are() -> None:
    libraries = [path for path in lminf_edge.lib_path().iterdir() if "llama" in path.name and path.suffix != ".cpp"]
    assert len(libraries) == 1
    patch_id = _core.patch_id()
    assert len(patch_id) == 64
    assert int(patch_id, 16) >= 0


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def test_n_ctx_says_that_it_has_no_effect_with_a_window(head_32: TinyModel) -> None:
    with pytest.warns(UserWarning, match="n_ctx = 4096 has no effect with lminf"):
        llm = Llama(head_32.path, lminf=WINDOW, n_ctx=4096)
    with llm:
        assert llm.n_ctx is None
