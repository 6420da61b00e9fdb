"""The compiled extension and the llama.cpp libraries that come with it."""

from __future__ import annotations

from pathlib import Path

try:
    from lminf_edge import _core
except ModuleNotFoundError as error:
    raise ImportError(
        "lminf_edge's extension module is not there: it is compiled when the package is installed. Run `pip install .` "
        "(or `pip install -e .`) in the project's folder, and do not import the package from its source folder."
    ) from error

__all__ = ["_core", "lib_path"]


def lib_path() -> Path:
    """Folder of the patched libllama and of the ggml libraries.

    Programs written for llama-cpp-python use them when the environment variable `LLAMA_CPP_LIB_PATH` names it.
    """
    return Path(_core.__file__).resolve().parent / "lib"


_core.init_backends(str(lib_path()))
