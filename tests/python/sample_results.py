"""Made-up results of every task, as the commands write them: what figures and pages are tested on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lminf_edge.evaluation.statistics import share_interval

METHODS = ("endless", "absolute", "shift", "full")
CACHES = ("f16", "q8_0", "q4_0")
N_TRAIN = 8192
N_WINDOW = 1024

Record = dict[str, Any]


def run(task: str, name: str = "model.gguf", **others: Any) -> Record:
    """The first line."""
    setup = {"model": f"/models/{name}", "methods": list(METHODS), "cache_types": list(CACHES), "n_sink": 4}
    return {
        "kind": "run",
        "version": 1,
        "task": task,
        "settings": {"setup": {**setup, "n_window": N_WINDOW, "n_clamp": None}, "seeds": [0, 1]},
        "model": {
            "path": f"/models/{name}",
            "name": name,
            "n_bytes": 1000,
            "sha256": "ab" * 32,
            "n_ctx_train": N_TRAIN,
        },
        "program": {"lminf_edge": "0.1.0", "llama_cpp": "b1234", "patch_id": "0123456789abcdef"},
        "machine": {
            "cpu": "Example CPU 3000 @ 2.00GHz",
            "n_cores": 2,
            "memory_bytes": 24 * 10**9,
            "system": "Linux x86_64",
            "python": "3.11.2",
            "devices": ["CPU"],
        },
        "command": f"lminf-edge {'bench' if task == 'bench' else f'eval {task}'} --methods {','.join(METHODS)}",
        "started": "2026-01-01T00:00:00+00:00",
        **others,
    }


def ppl(
    methods: Sequence[str] = METHODS, caches: Sequence[str] = CACHES, n_buckets: int = 12, bucket: int = 2048
) -> list[Record]:
    """Loss by position: methods without a clamp fail beyond the trained length."""
    rng = np.random.default_rng(0)
    text = 3.2 + 0.15 * rng.standard_normal(n_buckets)
    records = [run("ppl")]
    for index in range(n_buckets):
        names: Record = {"begin": index * bucket, "end": (index + 1) * bucket}
        for method in methods:
            for cache in caches:
                beyond = max(0, index * bucket - N_TRAIN) / N_TRAIN
                costs = {"f16": 0.0, "q8_0": 0.002, "q4_0": 0.06}[cache] + 0.001 * float(rng.standard_normal())
                fails = {"absolute": 2.0, "full": 3.0, "shift": 0.03}.get(method, 0.0) * min(1.2, beyond)
                loss = float(text[index]) + fails + costs
                way = {"method": method, "cache_type": cache}
                records.append(
                    {
                        "kind": "ppl.bucket",
                        **way,
                        **names,
                        "n_tokens": bucket,
                        "loss": estimate(loss, 0.05),
                        "perplexity": float(np.exp(loss)),
                        "tokens_per_second": 100.0,
                        "kv_bytes": 35_500_000,
                        "resident_bytes": 319_000_000,
                    }
                )
                others = [{"method": method, "cache_type": "f16"}] if cache != "f16" else []
                others += [{"method": "endless", "cache_type": cache}] if method != "endless" else []
                for other in others:
                    value = costs if other["method"] == method else fails
                    compared = {"of": other, "difference": estimate(value, 0.003), "ratio": loss / (loss - value)}
                    records.append({"kind": "ppl.difference", **way, **names, **compared})
    for method in methods:
        for cache in caches:
            slope = estimate(0.02, 0.1) if method == "endless" else None
            totals = {"n_tokens": n_buckets * bucket, "loss": 3.25, "perplexity": 25.8}
            way = {"method": method, "cache_type": cache}
            records.append({"kind": "ppl.summary", **way, **totals, "slope": slope, "slope_begin": N_TRAIN})
    return records


def passkey(methods: Sequence[str] = METHODS, caches: Sequence[str] = ("f16",)) -> list[Record]:
    """Passkeys: found inside the window."""
    rng = np.random.default_rng(0)
    records = [run("passkey")]
    trials: list[Record] = []
    for method in methods:
        for cache in caches:
            for length in (512, 2048, 8192, 32768):
                for number, depth in enumerate(3 * list(np.arange(0.05, 1, 0.1))):
                    distance = int((1 - depth) * length) + 20
                    inside = method == "full" or distance < N_WINDOW
                    seen = inside and not (method in ("absolute", "full") and length > N_TRAIN)
                    exact = bool(rng.random() < (0.95 if seen else 0.02))
                    trials.append(
                        {
                            "kind": "passkey.trial",
                            "method": method,
                            "cache_type": cache,
                            "length": length,
                            "depth": float(depth),
                            "trial": number,
                            "seed": 0,
                            "key": "12345",
                            "answer": "12345" if exact else "1",
                            "exact": exact,
                            "digits": exact,
                            "n_tokens": length,
                            "distance": distance,
                            "in_window": inside,
                            "seconds": 1.0,
                        }
                    )
    return records + trials + _passkey_cells(trials)


def passkey_at_distances(distances: Sequence[int] = (960, 1024, 1088)) -> list[Record]:
    """Passkeys at fixed distances, beside the cells of all: found inside the window."""
    records = [
        each for each in passkey(("endless",)) if each.get("depth_low", 0) == 0 and each.get("depth_high", 1) == 1
    ]
    for length in (2048, 8192):
        for distance in distances:
            share = vars(share_interval(8 if distance < N_WINDOW else 0, 8))
            depth = 1 - distance / length
            way = {"method": "endless", "cache_type": "f16"}
            place = {"length": length, "depth_low": depth, "depth_high": depth, "distance": distance}
            cell = {"in_window": None, "n_trials": 8, "exact": share, "digits": share}
            records.append({"kind": "passkey.cell", **way, **place, **cell})
    return records


def _passkey_cells(trials: list[Record]) -> list[Record]:
    cells = []
    for method, cache, length in dict.fromkeys((t["method"], t["cache_type"], t["length"]) for t in trials):
        own = [t for t in trials if (t["method"], t["cache_type"], t["length"]) == (method, cache, length)]
        parts = [(low / 5, (low + 1) / 5, None) for low in range(5)] + [(0.0, 1.0, w) for w in (True, False, None)]
        for low, high, inside in parts:
            chosen = [t for t in own if low <= t["depth"] < high and inside in (None, t["in_window"])]
            if chosen:
                share = vars(share_interval(sum(t["exact"] for t in chosen), len(chosen)))
                cells.append(
                    {
                        "kind": "passkey.cell",
                        "method": method,
                        "cache_type": cache,
                        "length": length,
                        "depth_low": low,
                        "depth_high": high,
                        "in_window": inside,
                        "n_trials": len(chosen),
                        "exact": share,
                        "digits": share,
                    }
                )
    return cells


def qa(methods: Sequence[str] = METHODS, lengths: Sequence[int | None] = (1024, 4096, 16384, None)) -> list[Record]:
    """Answers to questions."""
    rng = np.random.default_rng(0)
    records = [run("qa")]
    for method in methods:
        for cache in ("f16", "q4_0"):
            for length in lengths:
                for inside in (True, False, None):
                    f1 = 0.1 + 0.4 * bool(inside) + 0.1 * float(rng.random())
                    records.append(
                        {
                            "kind": "qa.cell",
                            "method": method,
                            "cache_type": cache,
                            "length": length,
                            "in_window": inside,
                            "n_questions": 60,
                            "f1": estimate(f1, 0.07),
                            "exact": estimate(f1 / 2, 0.07),
                        }
                    )
    return records


def bench(methods: Sequence[str] = METHODS, caches: Sequence[str] = CACHES) -> list[Record]:
    """Speed, memory and latency: full attention gets slower and larger, others do not."""
    records = [run("bench")]
    bandwidth = {"bytes_per_second": spread(1.2e10, 0.05), "n_threads": 2}
    records.append({"kind": "bench.bandwidth", **bandwidth})
    for method in methods:
        for index, cache in enumerate(caches):
            way: Record = {"method": method, "cache_type": cache}
            for depth in (0, 4096, 16384, 32768, 131072, 1048576):
                seen = depth if method == "full" else min(depth, N_WINDOW)
                if method == "full" and depth > 131072:
                    continue
                speed = 70 / (1 + seen / 2000) * (1 + 0.1 * index)
                records.append(
                    {
                        "kind": "bench.decode",
                        **way,
                        "depth": depth,
                        "tokens_per_second": spread(speed, 0.06),
                        "ratio": None if method == "full" else spread(speed * (1 + depth / 2000) / 70, 0.05),
                        "of": None if method == "full" else {"method": "full", "cache_type": "f16"},
                        "kv_bytes": int(max(seen, 256) * 23040 / (1 + index)),
                        "resident_bytes": 300_000_000,
                        "bytes_per_token": 120_000_000,
                        "roofline": 0.55,
                        "filled": "read",
                    }
                )
            stalls = {"endless": ("placement", 0.011), "shift": ("shift", 0.9)}.get(method, ("token", None))
            stall = {"name": stalls[0], "count": 3, "median": stalls[1], "max": stalls[1]}
            times = {"p50": 0.01, "p99": 0.0125, "max": 1.0 if method == "shift" else 0.03}
            records.append(
                {
                    "kind": "bench.latency",
                    **way,
                    "depth": 4096,
                    "n_tokens": 20000,
                    **times,
                    "stalls": [stall] if stalls[1] else [],
                }
            )
            for n_tokens in (4096, 32768):
                speed = 150 / (1 + (n_tokens / 9000 if method == "full" else 0))
                seconds = {"tokens_per_second": spread(speed, 0.05), "first_token": spread(n_tokens / speed, 0.05)}
                records.append({"kind": "bench.prompt", **way, "n_tokens": n_tokens, **seconds})
    return records


def estimate(mean: float, half: float | None) -> Record:
    """None: too few observations."""
    if half is None:
        return {"mean": mean, "low": None, "high": None}
    return {"mean": mean, "low": mean - half, "high": mean + half}


def spread(median: float, part: float) -> Record:
    return {"median": median, "low": median * (1 - part), "high": median * (1 + part)}


def written(path: Path, records: Iterable[Record]) -> Path:
    """As a results file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path
