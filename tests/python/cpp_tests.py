"""The C++ test programs, built once per checkout in build/cpp-tests against the installed libraries."""

import functools
from pathlib import Path

import build_id
import get_llama_cpp
from lminf_edge import lib_path
from lminf_edge._library import _core
from stock import ROOT, run, tool

FOLDER = ROOT / "build" / "cpp-tests"


@functools.cache
def cpp_test(name: str) -> Path:
    """Builds a program of tests/cpp and returns its path.

    It links the libraries that the package is installed with. Their private headers are taken from llama.cpp's source,
    extracted and patched anew, which takes seconds; llama.cpp is not compiled.

    Raises:
        RuntimeError: The build failed, or the installed package was built from other sources than the tests'.
    """
    lock, patch = get_llama_cpp.Lock.load(get_llama_cpp.LOCK_PATH), get_llama_cpp.PATCH_PATH.read_bytes()
    if build_id.abi_id(get_llama_cpp.patch_id(lock, patch), build_id.SOURCE_PATH) != _core.abi_id():
        raise RuntimeError("the installed lminf_edge is not built from this checkout: run `pip install .` again")
    source = get_llama_cpp.prepare(FOLDER, lock, patch)
    run(
        tool("cmake"), "-S", ROOT / "tests" / "cpp", "-B", FOLDER, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release", "-DLMINF_WERROR=ON",
        f"-DLMINF_LIB_PATH={lib_path()}", f"-DLMINF_LLAMA_CPP={source}",
    )  # fmt: skip
    run(tool("cmake"), "--build", FOLDER, "--target", name)
    return FOLDER / name
