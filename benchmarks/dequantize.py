"""Writes a GGUF model again with F32 weights.

Quantised weights hide what a comparison looks for: llama.cpp then rounds activations to 8 bits, and a difference in the
last bit of a sum can move one of them by a whole step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

_WRITTEN_ANYWAY = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_f32_model(source: Path, target: Path) -> Path:
    """Copies a model, its metadata and its vocabulary, with every tensor dequantised to F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(_WRITTEN_ANYWAY):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        weights = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, weights.reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


if __name__ == "__main__":
    write_f32_model(Path(sys.argv[1]), Path(sys.argv[2]))
