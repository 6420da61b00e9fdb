"""llama-cpp-python's `Llama` without an end: the class `EndlessLlama`.

The only module of this package that needs llama-cpp-python. Import it before `llama_cpp`: it sets `LLAMA_CPP_LIB_PATH`
if that is not set, so that `llama_cpp` loads this package's libraries.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lminf_edge._library import _core, lib_path
from lminf_edge._params import to_params
from lminf_edge.config import LMInfConfig
from lminf_edge.errors import ConfigError
from lminf_edge.threads import ThreadPlan

LLAMA_CPP_PYTHON_VERSION = "0.3.36"
"""The llama-cpp-python whose llama.cpp this package's libraries are built from. Others declare other structures."""

N_POSITIONS = 2**31 - 1
"""Tokens of one sequence that llama.h can count."""

_N_REMEMBERED = 64
"""Texts of fewer tokens are not worth remembering."""

_Array: TypeAlias = npt.NDArray[Any]

if importlib.util.find_spec("llama_cpp") is None:
    raise ImportError(
        "lminf_edge.llama_cpp needs llama-cpp-python. It can be installed without compiling: "
        'CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" '
        f"pip install llama-cpp-python=={LLAMA_CPP_PYTHON_VERSION}"
    )
os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(lib_path()))

import llama_cpp  # noqa: E402


def _check_llama_cpp() -> None:
    if llama_cpp.__version__ != LLAMA_CPP_PYTHON_VERSION:
        raise ImportError(
            f"this is llama-cpp-python {llama_cpp.__version__}; "
            f"lminf-edge's libraries are those of {LLAMA_CPP_PYTHON_VERSION}"
        )
    loaded = Path(llama_cpp.llama_cpp._lib._name)
    if not loaded.parent.samefile(lib_path()):
        raise ImportError(
            f"llama_cpp has loaded {loaded}, not a library of {lib_path()}: import lminf_edge.llama_cpp before "
            "llama_cpp, and leave LLAMA_CPP_LIB_PATH unset or name that folder in it"
        )


_check_llama_cpp()


class EndlessLlama(llama_cpp.Llama):  # type: ignore[misc]
    """`llama_cpp.Llama` on LM-Infinite, without the checks that refuse long prompts or stop at `n_ctx`.

    Everything else is inherited. Memory for keys and values is fixed; each token of the sequence takes four bytes more
    (`input_ids`, by which a prompt is recognised that goes on where the last one ended), and with `logits_all=True` its
    logits, as always.

    Args:
        model_path: A GGUF file.
        lminf: Sink tokens, window and clamp. None: all defaults.
        options: Those of `llama_cpp.Llama`. `n_ctx` bounds `n_batch` and is no limit for the text. `n_threads` and
            `n_threads_batch` follow what other processes leave, if they are not given.

    Raises:
        ConfigError: `lminf` does not fit the model or the other options.
        UnsupportedModelError: LM-Infinite cannot run this model.
        ValueError: As `llama_cpp.Llama`.
    """

    _stack = ExitStack()  # for __del__ of an object whose construction was refused

    def __init__(self, model_path: str, *, lminf: LMInfConfig | None = None, **options: Any) -> None:
        if lminf is not None and not isinstance(lminf, LMInfConfig):
            raise ConfigError(f"lminf = {lminf!r}: must be an LMInfConfig or None")
        self.lminf = LMInfConfig() if lminf is None else lminf
        self._decoded: dict[bool, tuple[list[int], bytes]] = {}
        self._given_threads = {name: options.get(name) for name in ("n_threads", "n_threads_batch")}
        self._threads = ThreadPlan(**self._given_threads)
        options["n_threads"], options["n_threads_batch"] = self._threads.now()
        _core.use_params(to_params(self.lminf, 0))
        try:
            super().__init__(model_path, **options)
        except ValueError:
            _core.raise_last_error()
            raise
        finally:
            _core.use_environment()

    def n_ctx(self) -> int:
        """The number of tokens at which the inherited methods see the context as full."""
        return N_POSITIONS

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the sequence.

        Args:
            tokens: Token ids, any number.
        """
        n_tokens = self.n_tokens + len(tokens) + self.n_batch  # draft tokens are written beyond the sequence's end
        self.input_ids: _Array = _with_room(self.input_ids, n_tokens)
        if self._logits_all:
            self.scores: _Array = _with_room(self.scores, n_tokens)
        self._ctx.set_n_threads(*self._threads.now())
        super().eval(tokens)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """The text of some tokens.

        A completion asks for the whole text of its answer after each token. What such a text begins with is kept from
        the time before, so that this does not get slower with each token.

        Args:
            tokens: Token ids.
            prev_tokens: Those before; only tokenizers other than llama.cpp's look at them.
            special: Spell special tokens out instead of leaving them away.
        """
        known, text = self._decoded.get(special, ([], b""))
        if len(tokens) < _N_REMEMBERED or type(self.tokenizer_) is not llama_cpp.LlamaTokenizer:
            return bytes(super().detokenize(tokens, prev_tokens, special))
        if text and tokens[: len(known)] == known:
            piece = super().detokenize
            text += b"".join(piece([token], special=special) for token in tokens[len(known) :])
        else:
            text = bytes(super().detokenize(tokens, prev_tokens, special))
        self._decoded[special] = (tokens.copy(), text)
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._given_threads, "lminf": self.lminf}


def _with_room(array: _Array, n_rows: int) -> _Array:
    """The array itself if it has so many rows, else a copy with at least twice as many as before."""
    if len(array) >= n_rows:
        return array
    larger = np.empty((max(n_rows, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger
