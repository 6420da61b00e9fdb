"""The compiled extension and the llama.cpp libraries that come with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["_core", "lib_path"]


if importlib.util.find_spec("lminf_edge._core") is None:
    raise ImportError(
        "lminf_edge's extension module is not there: it is compiled when the package is installed. Run `pip install .` "
        "(or `pip install -e .`) in the project's folder, and do not import the package from its source folder."
    )
from lminf_edge import _core


def lib_path() -> Path:
    """Folder of the patched libllama and of the ggml libraries.

    Programs written for llama-cpp-python use them when the environment variable `LLAMA_CPP_LIB_PATH` names it.
    """
    return Path(_core.__file__).resolve().parent / "lib"


_core.init_backends(str(lib_path()))
