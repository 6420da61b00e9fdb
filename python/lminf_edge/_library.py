"""The compiled extension and the llama.cpp libraries that come with it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["_core", "lib_path"]


@contextmanager
def _short_openmp_spinning() -> Iterator[None]:
    """Sets how long OpenMP's threads spin; libgomp reads that when it is loaded, which happens with the extension.

    The threads wait for each other at every operation of a graph, by default spinning so long that one other busy
    process can slow them down more than tenfold. This count lets them sleep sooner. Who has set one of these variables
    knows better.
    """
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "2000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


if importlib.util.find_spec("lminf_edge._core") is None:
    raise ImportError(
        "lminf_edge's extension module is not there: it is compiled when the package is installed. Run `pip install .` "
        "(or `pip install -e .`) in the project's folder, and do not import the package from its source folder."
    )
with _short_openmp_spinning():
    from lminf_edge import _core


def lib_path() -> Path:
    """Folder of the patched libllama and of the ggml libraries.

    Programs written for llama-cpp-python use them when the environment variable `LLAMA_CPP_LIB_PATH` names it.
    """
    return Path(_core.__file__).resolve().parent / "lib"


_core.init_backends(str(lib_path()))
