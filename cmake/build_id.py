"""Writes the header that says what a library, or an extension over it, was built from, so that they can compare.

The build runs it again when a file of src/ has changed. Only two sources include the header, src/api/lminf.cpp and
cpp/module.cpp, so that little is compiled for it, and nothing of llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from get_llama_cpp import HERE, LOCK_PATH, PATCH_PATH, Lock, patch_id, sha256, sha256_of_file

SOURCE_PATH = HERE.parent / "src"


def abi_id(patch: str, source: Path) -> str:
    """Returns the identity of all that decides whether extension and library fit together.

    That is llama.cpp, the patch, and every source of the engine: what a struct looks like, but also what its values
    mean.

    Args:
        patch: `get_llama_cpp.patch_id`.
        source: The folder src/.
    """
    paths = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix in (".cpp", ".h"))
    return sha256("".join([patch, *(f"\n{path} {sha256_of_file(source / path)}" for path in paths)]).encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("header", type=Path, help="file to write")
    options = parser.parse_args(arguments)

    patch = patch_id(Lock.load(LOCK_PATH), PATCH_PATH.read_bytes())
    options.header.write_text(
        f'#define LMINF_PATCH_ID "{patch}"\n#define LMINF_ABI_ID "{abi_id(patch, SOURCE_PATH)}"\n', encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
