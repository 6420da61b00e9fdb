"""Loss by position over a long text: full attention, the mask alone, and mask and clamp with each cache type.

    python benchmarks/drift.py novel.txt

Prints the table of docs/measurements.md. With the default model and 16,384 tokens: about ten minutes on two cores.
"""

from __future__ import annotations

import argparse

from lminf_edge import Llama, LMInfConfig
from lminf_edge.evaluation.streams import BucketedStream, read_stream
from tables import markdown_table, open_model_path, text_tokens

NO_CLAMP = 2**28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--bucket", type=int, default=2048)
    parser.add_argument("--n-window", type=int, default=2048)
    parser.add_argument("--n-sink", type=int, default=4)
    args = parser.parse_args()

    path = open_model_path(args.model)
    tokens = text_tokens(path, args.text, args.tokens)
    clamped = LMInfConfig(n_sink=args.n_sink, n_window=args.n_window)
    mask_only = LMInfConfig(n_sink=args.n_sink, n_window=args.n_window, n_clamp=NO_CLAMP, n_block=64)
    passes: list[tuple[str, LMInfConfig | None, str]] = [
        ("mask and clamp, f16 cache", clamped, "f16"),
        ("mask and clamp, q8_0 cache", clamped, "q8_0"),
        ("mask and clamp, q4_0 cache", clamped, "q4_0"),
        ("mask alone, f16 cache", mask_only, "f16"),
        ("full attention, f16 cache", None, "f16"),
    ]

    rows = []
    header = None
    for name, config, cache_type in passes:
        stream = BucketedStream(args.bucket)
        with Llama(
            path,
            lminf=config,
            n_ctx=None if config else len(tokens),
            n_ubatch=256,
            cache_type_k=cache_type,
            cache_type_v=cache_type,
        ) as llm:
            for piece in read_stream(llm, tokens):
                stream.add(piece)
            kv_bytes = llm.memory_stats().kv_bytes
        buckets = stream.buckets()
        header = ["loss, nats per token, up to token", *(f"{b.end:,}" for b in buckets), "KV memory"]
        rows.append([name, *(f"{b.loss:.3f}" for b in buckets), f"{kv_bytes / 2**20:.1f} MiB"])
        print(rows[-1], flush=True)
    assert header is not None
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
