"""How much faster prompt lookup makes a text, and that it does not make it slower where nothing repeats itself.

    python benchmarks/lookup.py novel.txt

Two contexts read the same prompt and write on in turns, one with speculate="lookup", `--rounds` times each; what they
have written is compared and taken back. Prints medians of the ratios of a round, with the least and the most. One
thread, so that processor time is what counts and not what else the machine does.

*Written*: what the model itself writes. *Given*: the model is made to write a given text, as one would that edits the
code without a mistake, goes on with the log as it goes on, or writes the novel; drawing is left out.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lminf_edge.stopping
from lminf_edge import Llama, LMInfConfig
from lminf_edge.drawing import DrawOptions, draw_tokens
from lminf_edge.evaluation.texts import text_file
from lminf_edge.records import GenerationStep
from lminf_edge.speculation import N_REMEMBERED, DraftCosts, LookupDrafts
from tables import markdown_table, open_model_path

SPECULATIONS: tuple[Any, Any] = (None, "lookup")
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 1}
GREEDY: dict[str, Any] = {"temperature": 0.0}


class Case(NamedTuple):
    """A prompt, how the model goes on by itself, and how it is made to go on."""

    name: str
    prompt: list[int]
    options: dict[str, Any]
    given: list[int]


class Given:
    """Takes the place of a sampler: draws given tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def accept(self, tokens: object) -> None:
        """There are no penalties."""

    def sample(self, context: object, n_top: int | None) -> tuple[int, float, list[Any]]:
        """The next token."""
        return next(self._tokens), float("nan"), []


def log_lines(n_lines: int) -> str:
    """What a small server writes."""
    rng = random.Random(1)
    pages = ["/", "/index.html", "/about.html", "/static/style.css", "/api/items?page=2"]
    lines = []
    for n in range(n_lines):
        seconds = 9 * n + rng.randint(0, 8)
        lines.append(
            f"2024-05-14T08:{seconds // 60 % 60:02d}:{seconds % 60:02d}Z INFO http: 10.0.0.{rng.randint(2, 5)} "
            f"GET {rng.choice(pages)} status={rng.choice([200, 200, 200, 304])} duration={rng.randint(2, 40)}ms"
        )
    return "\n".join(lines) + "\n"


def cases(llm: Llama, novel: str, n_tokens: int) -> Iterator[Case]:
    code = Path(lminf_edge.stopping.__file__).read_text()[:3000]
    request = f"Rewrite this file with the variable `held` renamed to `waiting`, and change nothing else:\n\n{code}"
    prompt = llm._chat_format.tokens([{"role": "user", "content": request}])
    given = llm.tokenize(code.replace("held", "waiting"), add_bos=False)
    yield Case("code that is edited", prompt, GREEDY, given[:n_tokens])

    lines = llm.tokenize(log_lines(80))
    yield Case("a log that goes on", lines[:2000], GREEDY, lines[2000 : 2000 + n_tokens])

    prose = llm.tokenize(novel)
    for name, options in (("a novel", SAMPLED), ("a novel, greedy", GREEDY)):
        yield Case(name, prose[3000:5000], options, prose[5000 : 5000 + n_tokens])


def written(llm: Llama, speculate: Any, case: Case, n_tokens: int) -> Iterator[GenerationStep]:
    return llm.generate(case.prompt[-1:], max_tokens=n_tokens, speculate=speculate, stop_at_end=False, **case.options)


def given(llm: Llama, speculate: Any, case: Case, n_tokens: int) -> Iterator[GenerationStep]:
    options = DrawOptions(max_tokens=n_tokens, stop_at_end=False, speculate=speculate)
    sampler: Any = Given(case.given)
    return draw_tokens(llm._sequence, np.array(case.prompt[-1:], np.int32), sampler, options)


def measure(models: Sequence[Llama], case: Case, write: Any, n_tokens: int, n_rounds: int) -> list[str]:
    """The cells of a row."""
    ratios: list[float] = []
    is_same = True
    for llm in models:
        llm.reset()
        llm.logprobs(case.prompt)
        llm.truncate(len(case.prompt) - 1)
    before = models[1].memory_stats()
    for _ in range(n_rounds):
        seconds, texts = [], []
        for llm, speculate in zip(models, SPECULATIONS, strict=True):
            begin = time.process_time()
            texts.append([step.token for step in write(llm, speculate, case, n_tokens)])
            seconds.append(time.process_time() - begin)
            llm.truncate(len(case.prompt) - 1)
        is_same = is_same and texts[0] == texts[1]
        ratios.append(seconds[0] / seconds[1])
    after = models[1].memory_stats()
    n_drafted, n_accepted = after.n_drafted - before.n_drafted, after.n_accepted - before.n_accepted
    return [
        f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{100 * n_accepted / (n_rounds * n_tokens):.0f} %",
        f"{100 * n_drafted / (n_rounds * n_tokens):.0f} %",
        "the same" if is_same else "another one",
    ]


def lookup_microseconds(tokens: Sequence[int]) -> tuple[float, float]:
    """Median processor time of a token's lookup, and that of indexing the text before it."""
    begin = time.thread_time()
    drafts = LookupDrafts(np.array(tokens, np.int32)[-N_REMEMBERED:], costs := DraftCosts())
    index = time.thread_time() - begin
    costs.add(0, 1.0)
    times = []
    for token in tokens[-5000:]:
        begin = time.thread_time()
        drafts.feed(token)
        drafts.draft(15)
        times.append(time.thread_time() - begin)
    return 1e6 * float(np.median(times)), 1e6 * index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file with prose")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--cache-type", default="q8_0")
    parser.add_argument("--tokens", type=int, default=200, help="that are written in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="texts with this in their names")
    args = parser.parse_args()

    path, novel = open_model_path(args.model), text_file(args.text)
    config = LMInfConfig(n_rollback=args.tokens + 1)
    options = {"lminf": config, "n_threads": 1, "cache_type_k": args.cache_type, "cache_type_v": args.cache_type}
    rows = []
    with Llama(path, **options) as plain, Llama(path, **options) as other:
        prose = plain.tokenize(novel)
        token, index = lookup_microseconds(prose[-(N_REMEMBERED + 5000) :])
        print(f"a lookup takes {token:.1f} microseconds, indexing the text before {index / 1000:.1f} milliseconds\n")
        for case in (case for case in cases(plain, novel, args.tokens) if args.only in case.name):
            for name, write in (("written", written), ("given", given)):
                rows.append([case.name, name, *measure((plain, other), case, write, args.tokens, args.rounds)])
                print(rows[-1], flush=True)
    header = ["text", "", "speed-up", "drafted and drawn, of all tokens", "drafted, of all tokens", "text"]
    print("\n" + markdown_table(header, rows))


if __name__ == "__main__":
    main()
