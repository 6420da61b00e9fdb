"""The choice of n_clamp and n_block: loss by position and passkeys inside the window.

    python benchmarks/defaults.py novel.txt

Prints the table of docs/measurements.md; about ten minutes on two cores with the default model.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from lminf_edge import Llama, LMInfConfig
from tables import markdown_table, open_model_path, text_tokens

N_BEFORE = 1536  # tokens before the passkey: the window is full and the sink tokens are clamped


def mean_loss(llm: Llama, tokens: list[int], begin: int) -> float:
    """Mean loss of the tokens from position begin on, in nats per token."""
    llm.reset()
    return float(-np.mean(llm.logprobs(tokens)[begin - 1 :], dtype=np.float64))


def passkey_accuracy(llm: Llama, tokens: list[int], distance: int, repetitions: int) -> float:
    """Share of five-digit passkeys, told `distance` tokens before the question, that greedy decoding repeats."""
    generator = random.Random(0)
    n_right = 0
    for i in range(repetitions):
        key = str(generator.randrange(10000, 100000))
        begin = i * 997 % (len(tokens) // 2)
        told = llm.tokenize(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n", add_bos=False)
        asked = llm.tokenize("\n\nWhat is the pass key? The pass key is", add_bos=False)
        before = tokens[begin : begin + N_BEFORE]
        between = tokens[begin + N_BEFORE : begin + N_BEFORE + distance]
        llm.reset()
        llm.logprobs([*before, *told, *between])
        answer = "".join(step.text for step in llm.generate(asked, max_tokens=8, temperature=0.0))
        n_right += key in answer
    return n_right / repetitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--n-window", type=int, default=1024)
    parser.add_argument("--passkeys", type=int, default=5)
    args = parser.parse_args()

    path: Path = open_model_path(args.model)
    tokens = text_tokens(path, args.text, args.tokens)
    window: int = args.n_window
    with Llama(path, lminf=LMInfConfig()) as llm:
        n_train = llm.n_ctx_train

    settings = [(window, 1), (window, 16), (window, 64), (n_train, 1), (n_train, 64)]
    rows = []
    for n_clamp, n_block in settings:
        config = LMInfConfig(n_window=window, n_clamp=n_clamp, n_block=n_block)
        with Llama(path, lminf=config, n_ubatch=256) as llm:
            within = mean_loss(llm, tokens, 2 * window)
            found = passkey_accuracy(llm, tokens, window // 2, args.passkeys)
        name = "W" if n_clamp == window else f"{n_clamp} (trained length)"
        rows.append([name, str(n_block), f"{within:.4f}", f"{found:.0%}"])
        print(rows[-1], flush=True)
    print(
        markdown_table(
            ["n_clamp", "n_block", f"loss beyond {2 * window} tokens", f"passkeys at distance {window // 2}"], rows
        )
    )


if __name__ == "__main__":
    main()
