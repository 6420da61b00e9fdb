"""Is a text harder at its end, or the model worse? Reads parts of a long run's text again, inside the trained length.

    python benchmarks/fresh_control.py kjv.jsonl --every 8

Takes results of `lminf-edge eval ppl --methods endless` and reads some of their buckets with sequences begun anew, of
which no position is beyond the trained length. Prints the ratio of losses by position, and the slope of the difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from lminf_edge import Llama
from lminf_edge.evaluation.methods import MethodSetup, Pass
from lminf_edge.evaluation.perplexity.passes import score_part
from lminf_edge.evaluation.results import read_results, settings_from
from lminf_edge.evaluation.statistics import mean_interval, slope_interval
from lminf_edge.evaluation.token_source import TokenSource, text_pieces, vocabulary_of
from lminf_edge.tokens import TokenArray


def text_tokens(model: str, text: str, n_tokens: int) -> TokenArray:
    """The first tokens of the text, as the run has read them."""
    with Path(text).open(encoding="utf-8") as stream:
        return TokenSource(vocabulary_of(model), text_pieces(stream, text)).take(n_tokens)


def fresh_loss(llm: Llama, tokens: TokenArray, begin: int, end: int) -> float:
    """Mean loss of the tokens after positions begin to end - 1, half a trained length at once behind another half."""
    half = llm.n_ctx_train // 2
    losses = []
    for first in range(begin, end, half):
        last = min(first + half, end)
        for status in score_part(llm, tokens[first - half : first], tokens[first:last], int(tokens[last])):
            assert status.piece is not None
            losses.append(status.piece.losses)
    return float(np.concatenate(losses).mean(dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", help="JSON lines of eval ppl")
    parser.add_argument("--every", type=int, default=8, help="read one bucket in so many")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    records = read_results(args.results, cut_off=True)
    settings = records[0]["settings"]
    setup = settings_from(MethodSetup, settings["setup"])
    way = Pass(method="endless", cache_type=setup.cache_types[0])
    buckets = [
        record
        for record in records
        if record["kind"] == "ppl.bucket" and (record["method"], record["cache_type"]) == (way.method, way.cache_type)
    ]
    tokens = text_tokens(setup.model, settings["text"], buckets[-1]["end"] + 1)
    options = setup.reader_options(way, 0)
    positions, losses, controls = [], [], []
    with Llama(
        setup.model,
        lminf=options.lminf,
        n_ubatch=setup.n_ubatch,
        n_threads=args.threads or setup.n_threads,
        cache_type_k=way.cache_type,
        cache_type_v=way.cache_type,
    ) as llm:
        beyond = [bucket for bucket in buckets if bucket["begin"] >= llm.n_ctx_train and bucket["end"] < len(tokens)]
        for bucket in beyond[:: args.every]:
            positions.append(bucket["end"])
            losses.append(bucket["loss"]["mean"])
            controls.append(fresh_loss(llm, tokens, bucket["begin"], bucket["end"]))
            ratio = losses[-1] / controls[-1]
            print(f"{bucket['end']:>9,}: {losses[-1]:.4f}, anew {controls[-1]:.4f}, ratio {ratio:.4f}", flush=True)
    difference = np.array(losses) - np.array(controls)
    ratios = mean_interval(np.array(losses) / np.array(controls))
    slope = slope_interval(np.array(positions) / 1e6, difference)
    print(f"ratio of losses: {ratios.mean:.4f} ({ratios.low:.4f} to {ratios.high:.4f})")
    print(f"slope of the difference, nats per million tokens: {slope.mean:.4f} ({slope.low:.4f} to {slope.high:.4f})")


if __name__ == "__main__":
    main()
