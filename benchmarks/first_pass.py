"""Middle tokens of a very long text: what a first pass misses, what recalling costs, and whether a key is found again.

    python benchmarks/first_pass.py bible.txt --tokens 1000000 --store store.bin --state state.bin

Reads one text, near whose beginning a key is told, with a store in a file. At lengths that double it asks for the key,
counts how many of the exactly best tokens the first pass would have chosen, and times decoding with and without
recall, in turns. A run that was stopped goes on at the last such length; one that is complete only measures again. A
million tokens take an hour or more and, with the default model, 12 GB of disk.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from lminf_edge import Llama, LMInfConfig, MiddleConfig
from lminf_edge.evaluation.passkey_prompts import QUESTION, TASK, TOLD
from lminf_edge.evaluation.texts import text_file, tokenize_text
from tables import markdown_table, open_model_path

PIECE = 4096
"""Tokens at a time."""

KEY = "73914"
QUESTIONS = (
    QUESTION,
    "\n\nWhat is the pass key? The pass key is the number",
    "\n\nWhat is the pass key? The pass key is",
    " I was asked for the pass key and answered:",
)
"""The first one is that of `lminf-edge eval passkey`."""


def ask(llm: Llama, question: str) -> bool:
    """Whether the model says the key; the question and the answer are taken back."""
    n_past = llm.n_past
    tokens = llm.tokenize(question, add_bos=False)
    answer = "".join(step.text for step in llm.generate(tokens, max_tokens=8, temperature=0, recall=True))
    llm.truncate(n_past)
    return KEY in answer


def decode_seconds(llm: Llama, recall: bool) -> float:
    """Median time of a token; what was decoded is taken back."""
    n_past = llm.n_past
    times, clock = [], time.perf_counter()
    start = llm.tokenize(" The", add_bos=False)
    for _ in llm.generate(start, max_tokens=24, temperature=0, stop_at_end=False, recall=recall):
        now = time.perf_counter()
        times.append(now - clock)
        clock = now
    llm.truncate(n_past)
    return float(np.median(times[2:]))


def exact_share(llm: Llama) -> float:
    """Of the tokens that a look at all keys recalls, those that the first pass would have chosen."""
    before = llm._context.test_get_candidates()
    llm._context.test_check_candidates(True)
    ask(llm, QUESTIONS[0])
    llm._context.test_check_candidates(False)
    n_recalled, n_found = np.subtract(llm._context.test_get_candidates(), before)
    return float(n_found / n_recalled)


def measure(llm: Llama, rounds: int) -> list[str]:
    """A row of the table."""
    n_found = sum(ask(llm, question) for question in QUESTIONS)
    share = exact_share(llm)
    pairs = [(decode_seconds(llm, False), decode_seconds(llm, True)) for _ in range(rounds)]
    ratios = [without / recalling for without, recalling in pairs]
    without, recalling = np.median(pairs, axis=0)
    return [
        f"{llm.n_past:,}",
        f"{n_found} of {len(QUESTIONS)}",
        f"{share:.3f}",
        f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        f"{1 / recalling:.1f}",
        f"{1 / without:.1f}",
        f"{(llm.memory_stats().store_bytes or 0) / 1e9:.2f} GB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="where to end")
    parser.add_argument("--first", type=int, default=2**16, help="the first length to measure at")
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--n-window", type=int, default=256)
    parser.add_argument("--store", required=True, help="file for the store")
    parser.add_argument("--state", required=True, type=Path, help="file for the state that a run goes on from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    path = open_model_path(args.model)
    tokens = tokenize_text(path, TASK + text_file(args.text)).tokens
    if len(tokens) < args.tokens:
        raise SystemExit(f"{args.text} has only {len(tokens)} tokens")
    middle = MiddleConfig(n_candidates=args.candidates, max_tokens=args.tokens + 4096, path=args.store)
    lengths = [args.first * 2**i for i in range(32) if args.first * 2**i < args.tokens] + [args.tokens]
    rows = []
    with Llama(
        path,
        lminf=LMInfConfig(n_window=args.n_window, middle=middle),
        n_threads=args.threads,
        cache_type_k="q8_0",
        cache_type_v="q8_0",
    ) as llm:
        if args.state.exists():
            llm.load_state(args.state)
        else:
            begin = tokens[:1000] + llm.tokenize(TOLD.format(key=KEY), add_bos=False)
            list(llm.generate(begin, max_tokens=0))
        for length in lengths:
            while llm.n_past < length:
                list(llm.generate(tokens[llm.n_past : min(llm.n_past + PIECE, length)], max_tokens=0))
            if llm.n_past == length:
                llm.save_state(args.state)
                rows.append(measure(llm, args.rounds))
                print(*rows[-1], flush=True)
    titles = ("tokens", "key told", "best tokens found", "speed / without", "tokens/s", "without", "store")
    print(markdown_table(titles, rows))


if __name__ == "__main__":
    main()
