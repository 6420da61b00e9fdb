"""What tests of `bench` share: a short run on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lminf_edge.evaluation.bench import BenchSettings
from lminf_edge.evaluation.methods import MethodSetup
from lminf_edge.evaluation.results import Record, read_results
from tiny_models import TinyModel, random_tokens

TOKENS = np.array(random_tokens(500, seed=31), np.int32)


def settings_for(model: TinyModel | Path, **changes: Any) -> BenchSettings:
    """A short run: window 64, two rounds."""
    setup = MethodSetup(
        model=str(model if isinstance(model, Path) else model.path),
        methods=("endless", "full", "shift"),
        cache_types=("f16",),
        n_sink=4,
        n_window=64,
        n_threads=1,
        n_ubatch=32,
    )
    setup = replace(setup, **changes.pop("setup", {}))
    values: dict[str, Any] = {
        "recompute": True,
        "depths": (0, 100, 600),
        "near": 300,
        "far": 2**20,
        "rounds": 2,
        "n_decode": 4,
        "n_read": 128,
        "prompts": (100, 300),
        "prompt_rounds": 1,
        "n_latency": 130,
    }
    return BenchSettings(setup=setup, **{**values, **changes})


def of_kind(file: Path, kind: str) -> list[Record]:
    return [record for record in read_results(file) if record["kind"] == kind]
