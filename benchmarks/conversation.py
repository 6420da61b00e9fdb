"""A long conversation: memory and time to the first token of an answer, turn after turn, and what the model sees.

    python benchmarks/conversation.py novel.txt

Questions of equal length are made from the text. Prints the figures of docs/chat.md; with the default model and 50,000
tokens about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time

from lminf_edge import ChatSession
from lminf_edge.evaluation.texts import text_file
from tables import markdown_table, open_model_path

SYSTEM = "You are a careful reader. You answer in one short sentence."
TURNS = (20, 200)  # compared: the median of the five turns before and after each


def sink_originals(session: ChatSession) -> list[bytes | None]:
    """The un-rotated keys of the pinned tokens, as they were first computed."""
    n_pinned = session.usage.n_tokens_pinned
    return [session.llm._context.test_get_sink_original(0, j) for j in range(n_pinned)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--question", type=int, default=200, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer, at most")
    parser.add_argument("--n-window", type=int, default=1024)
    args = parser.parse_args()

    path = open_model_path(args.model)
    first_tokens: list[float] = []
    rows = []
    with ChatSession.open(
        path, system=SYSTEM, n_window=args.n_window, cache_type_k="q8_0", cache_type_v="q8_0", seed=0
    ) as session:
        text = session.llm.tokenize(text_file(args.text), add_bos=False)
        originals: list[bytes | None] = []
        while session.usage.n_tokens < args.tokens:
            n_turn = len(first_tokens)
            begin = n_turn * args.question % (len(text) - args.question)
            question = session.llm.detokenize(text[begin : begin + args.question])
            start = time.perf_counter()
            chunks = session.send(question, max_tokens=args.answer, temperature=0.7)
            next(chunk for chunk in chunks if chunk["choices"][0]["delta"].get("content"))
            first_tokens.append(time.perf_counter() - start)
            for _ in chunks:
                pass
            originals = originals or sink_originals(session)
            seen = [message["role"] for message in session.remembered_messages]
            assert seen == ["system", *["user", "assistant"] * (len(seen) // 2)], seen
            turn = n_turn + 1
            if turn == TURNS[0] or turn % 50 == 0:
                stats = session.memory_stats()
                memory = (f"{stats.kv_bytes / 1e6:.1f}", f"{stats.resident_bytes / 1e6:.0f}")
                row = [turn, session.usage.n_tokens, len(seen), *memory]
                rows.append([str(value) for value in row])
                print(rows[-1], flush=True)
        assert sink_originals(session) == originals
        usage = session.usage
    early, late = (statistics.median(first_tokens[turn - 6 : turn + 5]) for turn in TURNS)
    print(
        markdown_table(["turn", "tokens", "messages that the model sees", "keys and values, MB", "resident, MB"], rows)
    )
    print(f"time to first token: turn {TURNS[0]} {early:.3f} s, turn {TURNS[1]} {late:.3f} s, ratio {late / early:.3f}")
    print(f"pinned: {usage.n_tokens_pinned} tokens, originals byte-equal; forgotten: {usage.n_tokens_forgotten} tokens")


if __name__ == "__main__":
    main()
