"""Tables of many figures are legible on a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lminf_edge.cli.eval_passkey import _by_place, _distance
from lminf_edge.cli.eval_ppl import _by_position


def printed(table: Table) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_keys_at_many_distances() -> None:
    cells: list[dict[str, Any]] = [
        {"method": method, "cache_type": "q8_0", "length": 16384, "distance": distance, "exact": {"mean": 0.5}}
        for method in ("middle", "endless")
        for distance in range(1000, 21000, 1000)
        if (method, distance) != ("endless", 3000)
    ]
    text = printed(_by_place("By distance", cells, _distance))
    assert "…" not in text
    assert text.count("50 %") == len(cells)
    assert all(f"{distance:,}" in text for distance in range(1000, 21000, 1000))


def test_losses_of_many_passes() -> None:
    methods = ("endless", "full", "absolute", "shift", "fresh")
    common = {"perplexity": 30.0, "slope": None, "kv_bytes": 1e6, "resident_bytes": 1e6, "n_tokens": 4096, "end": 4096}
    passes = [{"method": method, "cache_type": kind, **common} for method in methods for kind in ("f16", "q8_0")]
    buckets = [
        {**each, "loss": {"mean": 3.456 if each["cache_type"] == "f16" else 4.567, "high": 4.0}} for each in passes
    ]
    summaries = [{**each, "loss": 3.4567} for each in passes if each["cache_type"] == "f16"]
    text = printed(_by_position("f16", buckets, summaries))
    assert "f16 cache" in text
    assert "…" not in text
    assert text.count("3.456 ") == len(methods)
    assert "4.567" not in text
