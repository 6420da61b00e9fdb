"""Which types of weights give a token the same bits alone and among others: the table of docs/determinism.md.

`python tests/python/weight_types.py` prints it for this machine. Tiny models are made of each type and asked.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

# this file is also a program, and then it has no conftest.py to say where the benchmarks' modules are
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from lminf_edge._library import _core
from quantize import FILE_TYPES, quantize_model
from tables import markdown_table
from tiny_models import TinyShape, write_tiny_model

SHAPE = TinyShape(head_size=64, n_ff=512, n_ctx_train=512)
"""Rows of 256 and 512 weights: every type has a block that divides them."""


def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        f32 = write_tiny_model(Path(folder) / "source.gguf", SHAPE, seed=1).path
        for weight_type in FILE_TYPES:
            path = quantize_model(f32, Path(folder) / f"{weight_type}.gguf", weight_type)
            alone = _core.Model(str(path)).weights()
            together = _core.Model(str(path), deterministic=True).weights(deterministic=True)
            for (name, buffer_type, _, same_bits), (_, _, _, with_option) in zip(alone, together, strict=True):
                answers = ["yes" if answer else "no" for answer in (same_bits, with_option)]
                rows[name] = [name, "repacked" if "MAPPED" not in buffer_type.upper() else "as it is", *answers]
    print(markdown_table(("weights", "kept", "same bits", "deterministic"), list(rows.values())))


if __name__ == "__main__":
    main()
