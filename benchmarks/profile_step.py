"""Where the time of a decode step, or of reading a prompt, goes at a full window: a profile by perf, in parts.

    python benchmarks/profile_step.py novel.txt --threads 1

For each cache type, with attention of our own and with llama.cpp's: the parts' shares, and milliseconds of processor
time a token. Needs Linux' perf (any event: it samples the processor's clock), and the default model's weights for the
names of the parts (of another model's types, products of weights may count as attention).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from decode_step import open_with
from lminf_edge import Llama
from tables import markdown_table, open_model_path, text_tokens

PARTS = {
    "attention: keys": r"tile_worker::score|unpack_key|multiply_key|vec_dot_(f16|q8_0_q8_0|q4_0_q8_0)|simd_gemm",
    "attention: softmax": r"tile_worker::compute_part|soften|expf|soft_max",
    "attention: values": r"add_(packed|unpacked|weighted)|unpack_values|dequantize_row|vec_mad|vec_scale",
    "attention: the rest": r"tile_worker|job_worker|lminf_attention|unpack_factors|unit_weights|flash_attn|for_rows",
    "products of weights": r"vec_dot|mul_mat|gemm|gemv|quantize_row|sgemm|tinyBLAS",
    "waiting": r"libgomp|barrier|thread_relax",
}


def profile(llm: Llama, tokens: list[int], prompt: bool) -> tuple[dict[str, float], float]:
    """Shares of the parts, and seconds of processor time a token."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "perf.data"
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "4000", "-p", str(os.getpid()), "-o", str(data)]
        with subprocess.Popen(record) as perf:
            time.sleep(0.5)  # until it has attached itself
            begin = time.process_time()
            if prompt:
                next(llm.generate(tokens, max_tokens=1))
            else:
                for token in tokens:
                    llm.eval([token])
            seconds = (time.process_time() - begin) / len(tokens)
            perf.send_signal(signal.SIGINT)
        report = ["perf", "report", "-i", str(data), "--stdio", "--no-children", "--sort", "dso,symbol", "-q"]
        listing = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    shares = dict.fromkeys([*PARTS, "everything else"], 0.0)
    for line in listing.splitlines():
        if match := re.match(r"\s*([\d.]+)%\s+(.*)", line):
            part = next((part for part, names in PARTS.items() if re.search(names, match[2])), "everything else")
            shares[part] += float(match[1])
    return shares, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text file")
    parser.add_argument("--model", help="GGUF file; default: the default model")
    parser.add_argument("--n-window", type=int, default=2048)
    parser.add_argument("--cache-types", default="f16,q8_0,q4_0")
    parser.add_argument("--decode", type=int, default=100, help="tokens of a profile")
    parser.add_argument("--prompt", action="store_true", help="a prompt of 1,024 tokens instead of single tokens")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    path = open_model_path(args.model)
    n_tokens = 1024 if args.prompt else args.decode
    tokens = text_tokens(path, args.text, args.n_window + 100 + n_tokens)
    rows = []
    for cache_type in args.cache_types.split(","):
        for attention in ("stock", "lminf"):
            options = {"cache_type_k": cache_type, "cache_type_v": cache_type, "n_threads": args.threads}
            with open_with(attention, path, args.n_window, **options) as llm:
                next(llm.generate(tokens[:-n_tokens], max_tokens=1))
                shares, seconds = profile(llm, tokens[-n_tokens:], args.prompt)
            rows.append(
                [cache_type, "llama.cpp's" if attention == "stock" else "ours", f"{seconds * 1e3:.2f}"]
                + [f"{share / 100 * seconds * 1e3:.2f}" for share in shares.values()]
            )
    print(markdown_table(["cache", "attention", "ms a token", *PARTS, "everything else"], rows))


if __name__ == "__main__":
    main()
