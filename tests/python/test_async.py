"""Streams for asyncio: computed in a worker thread, ended when nobody wants them any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lminf_edge import ConfigError, Llama, LMInfConfig, StateError
from tiny_models import TinyModel

QUESTION = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
def tiny(head_32: TinyModel) -> Iterator[Llama]:
    """A tiny random model with a window of 64."""
    with Llama(head_32.path, lminf=LMInfConfig(n_window=64), n_threads=1, seed=0) as llm:
        yield llm


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[Llama]:
    """The default model with a window of 256."""
    with Llama(default_model, lminf=LMInfConfig(n_window=256), seed=0) as llm:
        yield llm


def banned(llm: Llama) -> dict[int, float]:
    """A bias against the end of the text: a random model could draw it at any time."""
    return dict.fromkeys(llm.tokenize("<|endoftext|><|im_start|><|im_end|>", special=True), -1000.0)


def test_the_pieces_are_those_of_the_ordinary_stream(tiny: Llama) -> None:
    options: Any = {"max_tokens": 8, "temperature": 0}

    async def collect() -> tuple[list[Any], list[Any]]:
        texts = [piece["choices"] async for piece in tiny.acreate_completion("abc", **options)]
        return texts, [piece["choices"] async for piece in tiny.acreate_chat_completion(QUESTION, **options)]

    texts, answers = asyncio.run(collect())
    assert texts == [piece["choices"] for piece in tiny.create_completion("abc", stream=True, **options)]
    assert answers == [piece["choices"] for piece in tiny.create_chat_completion(QUESTION, stream=True, **options)]


def test_the_event_loop_goes_on_while_a_model_computes(real: Llama) -> None:
    async def count_meanwhile() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.002)
                ticks += 1

        ticker = asyncio.create_task(tick())
        async for _ in real.acreate_completion([5] * 200, max_tokens=1):
            pass
        ticker.cancel()
        return ticks

    assert asyncio.run(count_meanwhile()) > 10


def test_wrong_arguments_are_refused_at_once(tiny: Llama) -> None:
    with pytest.raises(ConfigError, match="top_p"):
        tiny.acreate_completion("abc", top_p=5.0)
    with pytest.raises(ConfigError, match="messages is empty"):
        tiny.acreate_chat_completion([])


def test_a_cancelled_task_ends_the_reading_of_a_long_prompt(real: Llama) -> None:
    async def cancel() -> float:
        async def read() -> None:
            async for _ in real.acreate_completion([5] * 100_000, max_tokens=1):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.3)
        start = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - start

    real.reset()
    assert asyncio.run(cancel()) < 2.0
    n_past = real.n_past
    assert n_past < 5000
    assert n_past % 256 == 0
    real.eval([5])
    assert real.n_past == n_past + 1


def test_a_cancelled_text_ends_between_tokens(tiny: Llama) -> None:
    async def leave() -> None:
        async def endless() -> None:
            # a stop string that holds everything back: no piece is handed out
            async for _ in tiny.acreate_completion("abc", max_tokens=-1, logit_bias={50: 500.0}, stop=["R" * 10_000]):
                pass

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(endless(), 0.3)

    asyncio.run(leave())
    n_past = tiny.n_past
    time.sleep(0.05)
    assert tiny.n_past == n_past > 10


def test_a_stream_left_in_the_middle_frees_the_object(tiny: Llama) -> None:
    async def leave() -> int:
        stream = tiny.acreate_completion("abc", max_tokens=-1, logit_bias=banned(tiny))
        async for _ in stream:
            if tiny.n_past > 20:
                break
        await stream.aclose()
        return tiny.n_past

    n_past = asyncio.run(leave())
    tiny.eval([5])
    assert tiny.n_past == n_past + 1


def test_two_streams_at_once_do_not_mix_their_texts(tiny: Llama) -> None:
    async def both() -> list[Any]:
        async def write(prompt: str) -> str:
            pieces = tiny.acreate_completion(prompt, max_tokens=30, temperature=0, logit_bias=banned(tiny))
            return "".join([piece["choices"][0]["text"] async for piece in pieces])

        return [*await asyncio.gather(write("abc"), write("xyz"), return_exceptions=True)]

    options: Any = {"max_tokens": 30, "temperature": 0, "logit_bias": banned(tiny)}
    alone = [tiny.create_completion(prompt, **options)["choices"][0]["text"] for prompt in ("abc", "xyz")]
    results = asyncio.run(both())
    assert any(isinstance(result, StateError) for result in results)
    for result, text in zip(results, alone, strict=True):
        assert isinstance(result, StateError) or result == text


def test_an_error_in_the_worker_thread_reaches_the_task(tiny: Llama) -> None:
    async def fail() -> None:
        (end,) = tiny.tokenize("<|im_end|>", special=True)
        async for _ in tiny.acreate_completion("abc", grammar=f'root ::= <[{end}]> "a"', max_tokens=5):
            pass

    with pytest.raises(StateError, match="grammar allows no token"):
        asyncio.run(fail())
