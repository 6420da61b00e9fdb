"""Writes a GGUF model again with weights of another type, by llama.cpp's own quantisation.

python benchmarks/quantize.py model-f32.gguf model-q4_k.gguf q4_K
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np

from lminf_edge import lib_path

FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 8,
    "q5_1": 9,
    "q2_K": 10,
    "q3_K": 11,
    "q4_K": 14,
    "q5_K": 16,
    "q6_K": 18,
    "iq1_s": 24,
    "iq1_m": 31,
    "iq2_xxs": 19,
    "iq2_xs": 20,
    "iq2_s": 28,
    "iq3_xxs": 23,
    "iq3_s": 26,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "tq1_0": 36,
    "tq2_0": 37,
}
"""ggml's name of a type: llama.h's number (llama_ftype) of the kind of file that has it for all of its matrices."""


class _Importance(ctypes.Structure):
    """llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Params(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_Importance)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


def quantize_model(source: Path, target: Path, weight_type: str) -> Path:
    """Copies a model with its matrices in another type.

    Args:
        source: A GGUF file with F32 or F16 matrices.
        target: The file to write.
        weight_type: One of `FILE_TYPES`.
            A matrix whose rows are no multiple of the type's block gets another one.

    Raises:
        RuntimeError: llama.cpp could not do it.
    """
    library = ctypes.CDLL(str(next(path for path in lib_path().iterdir() if path.stem.removeprefix("lib") == "llama")))
    library.llama_model_quantize_default_params.restype = _Params
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Params))
    library.llama_model_quantize.restype = ctypes.c_uint32

    params = library.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[weight_type]
    params.pure = True
    params.allow_requantize = True
    # the smallest types are refused without it: all columns are equally important
    ones = np.ones(2**20, np.float32)
    data = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    matrices = [tensor for tensor in gguf.GGUFReader(source).tensors if len(tensor.shape) > 1]
    importance = [_Importance(t.name.encode(), data, int(t.shape[0]) * int(np.prod(t.shape[2:]))) for t in matrices]
    params.imatrix = (_Importance * (len(matrices) + 1))(*importance)
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not write {target} with {weight_type} weights")
    return target


if __name__ == "__main__":
    quantize_model(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
