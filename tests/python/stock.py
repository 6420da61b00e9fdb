"""The stock (unpatched) llama.cpp, built once per checkout in build/stock, as something to compare with."""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Runs a command in the checkout's root; its whole output is in the error when it fails."""
    variables = {**os.environ, **(environment or {})}
    result = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        output = result.stdout.decode(errors="replace")[-8000:]
        raise RuntimeError(f"{shlex.join(map(str, command))} failed:\n{output}")


def tool(name: str) -> str:
    """Returns a build tool of this Python environment (its scripts need not be on the PATH), or the system's."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed: pip install '.[test]'")
    return found


@functools.cache
def stock_program() -> Path:
    """Builds the preset `stock` (minutes the first time, a second later on) and returns its lminf-logits.

    CMAKE_ARGS is used as in the installation of the package, so that both are built with the same ggml options.
    """
    cmake = tool("cmake")
    options = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    python, ninja = f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    run(cmake, "--preset", "stock", python, ninja, *options)
    run(cmake, "--build", "--preset", "stock")
    return ROOT / "build" / "stock" / "tests" / "cpp" / "lminf-logits"


def stock_logits(
    model_path: str | os.PathLike[str],
    tokens: Sequence[int],
    *,
    n_ctx: int | None = None,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int = 1,
    type_k: str = "f16",
    type_v: str = "f16",
    flash_attn: bool = False,
) -> npt.NDArray[np.float32]:
    """Returns stock llama.cpp's logits after each token, float32 [n_tokens, n_vocab], computed on the CPU.

    Args:
        model_path: A GGUF file.
        tokens: Token ids, fed in batches of `n_batch` from position 0 on.
        n_ctx: Context size; by default the number of tokens.
        n_batch: Tokens per llama_decode().
        n_ubatch: Tokens per micro-batch.
        n_threads: Threads, for prompts and single tokens alike.
        type_k: Cache type of keys, by its ggml name.
        type_v: Cache type of values.
        flash_attn: Whether flash attention is used.

    Raises:
        RuntimeError: The build or the program failed; the message holds its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokens_path, logits_path = Path(folder, "tokens.bin"), Path(folder, "logits.bin")
        np.asarray(tokens, dtype=np.int32).tofile(tokens_path)
        numbers = [n_ctx or len(tokens), n_batch, n_ubatch, n_threads]
        run(
            stock_program(), Path(model_path).resolve(), tokens_path, logits_path,
            *map(str, numbers), type_k, type_v, str(int(flash_attn)),
        )  # fmt: skip
        return np.fromfile(logits_path, dtype=np.float32).reshape(len(tokens), -1)
