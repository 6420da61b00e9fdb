"""A language model that reads a text without end: the class `Llama`."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import cached_property
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any

from lminf_edge import hugging_face
from lminf_edge._checks import check_bool, check_choice, check_int, check_optional_int
from lminf_edge._library import _core
from lminf_edge._params import batch_sizes, from_params, to_params
from lminf_edge._typing import Self
from lminf_edge.chat_prompt import ChatFormat
from lminf_edge.chat_template import builtin_template_names
from lminf_edge.completion_methods import CompletionMethods
from lminf_edge.config import LMInfConfig
from lminf_edge.drawing import DrawOptions, draw_tokens
from lminf_edge.errors import ConfigError, StateError, UnsupportedModelError
from lminf_edge.gguf_file import check_gguf_file
from lminf_edge.middle import Recall, RecallPlan, RecallScope, recall_mode, recall_plan
from lminf_edge.records import GenerationStep, MemoryStats, RecalledToken, TextPiece
from lminf_edge.sampling import N_SEED_MAX, SamplingOptions
from lminf_edge.saved_state import config_settings, sequence_state, state_file
from lminf_edge.scoring_methods import ScoringMethods
from lminf_edge.sequence import ModelSequence
from lminf_edge.speculation import Speculation, check_speculation
from lminf_edge.state_file import StateFile, model_fingerprint, read_state_file, write_state_file
from lminf_edge.text_generation import TextOptions, write_text
from lminf_edge.threads import ThreadPlan
from lminf_edge.tokens import TokenArray, TokenSequence, as_token_array

N_CTX_MAX = 2**24
"""Longer plain contexts fill the machine's memory before llama.cpp finds out that they do not fit."""

N_RECALLED = 16
"""How many of the tokens that were looked up are told, unless the caller says otherwise."""


class Llama(CompletionMethods, ScoringMethods):
    """A GGUF model and one sequence of tokens that grows with every call.

    With `lminf` the sequence never ends: memory and speed stay what they are after the first window. Without it this
    is plain llama.cpp: full attention, and a ContextError when the context is full.

    One thread at a time can compute; another one that tries gets a StateError. While the model computes, the GIL is
    released and Ctrl-C works: it raises KeyboardInterrupt, complete micro-batches stay in the sequence (`n_past`
    tells) and the object remains usable.

    Args:
        model_path: A GGUF file. All other arguments are keyword-only.
        lminf: Sink tokens, window and clamp. None: plain llama.cpp.
        n_ctx: Context length in tokens, for plain llama.cpp only (with lminf a warning says so); llama.cpp rounds it
            up to a multiple of 256. None: the length that the model was trained on.
        n_batch: Tokens handed to llama.cpp at once. None: 2048, at least n_ubatch.
        n_ubatch: Tokens computed at once (a micro-batch). None: 256, at most n_batch. It adds to the window's cells.
        n_threads: Threads for generation. None: the usable physical cores, and fewer while other processes use some
            of them (looked at about four times a second, on Linux). The result does not depend on it.
        n_threads_batch: Threads for prompts. None: as for generation.
        n_gpu_layers: Layers to keep on a GPU if there is one; -1 means all.
        cache_type_k: Type of the cached keys: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl.
        cache_type_v: Type of the cached values. Quantised values need flash attention.
        flash_attn: None: when llama.cpp finds it supported.
        seed: Makes generation repeatable. None: a random one.
        chat_format: One of llama.cpp's chat formats, such as "chatml". None: the chat template in the model file.
        deterministic: The logits of a token have the same bits however the text before it came to be read: in pieces of
            any size, by any number of threads, beside others, restored, or after something was taken back. Weights
            stay as they are in the file and the CPU computes, which makes prompts slower (docs/determinism.md). Needs
            lminf. A model for which it cannot be so is refused.
        use_mmap: Map the model file instead of reading it.
        use_mlock: Forbid the system to swap the model out.
        verbose: Show llama.cpp's own log on standard error.
        progress: Called with the loaded fraction (0 to 1) while the model loads.

    Raises:
        ConfigError: An argument, or a combination of arguments, is out of range.
        ModelLoadError: The file is missing, unreadable or damaged.
        UnsupportedModelError: llama.cpp, or LM-Infinite, cannot run this model.
        ContextError: llama.cpp could not make the context, for example for lack of memory.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        lminf: LMInfConfig | None = None,
        n_ctx: int | None = None,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_gpu_layers: int = 0,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        flash_attn: bool | None = None,
        seed: int | None = None,
        chat_format: str | None = None,
        deterministic: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        verbose: bool = False,
        progress: Callable[[float], object] | None = None,
        _n_rebase: int = 0,
        _n_seq_max: int = 1,
    ) -> None:
        if lminf is not None and not isinstance(lminf, LMInfConfig):
            raise ConfigError(f"lminf = {lminf!r}: must be an LMInfConfig or None")
        if lminf is not None and n_ctx is not None:
            check_optional_int("n_ctx", n_ctx, 1, N_CTX_MAX)
            warnings.warn(
                f"n_ctx = {n_ctx} has no effect with lminf: texts have any length, and n_window decides the memory",
                stacklevel=2,
            )
            n_ctx = None
        if check_bool("deterministic", deterministic) and lminf is None:
            raise ConfigError(
                "deterministic = True: needs lminf, since llama.cpp's attention depends on how a text is cut"
            )
        if deterministic and n_gpu_layers != 0:
            raise ConfigError(f"n_gpu_layers = {n_gpu_layers}: must be 0 with deterministic, which computes on the CPU")
        check_optional_int("n_threads", n_threads, 1, 512)
        check_optional_int("n_threads_batch", n_threads_batch, 1, 512)
        threads = ThreadPlan(n_threads, n_threads_batch)
        batch, ubatch = batch_sizes(n_batch, n_ubatch)
        if flash_attn is not None:
            check_bool("flash_attn", flash_attn)
        for name, cache_type in (("cache_type_k", cache_type_k), ("cache_type_v", cache_type_v)):
            check_choice(name, cache_type, _core.cache_types())
        if chat_format is not None:
            check_choice("chat_format", chat_format, builtin_template_names())
        self._chat_format_name = chat_format
        self._random = random.Random(check_optional_int("seed", seed, 0, N_SEED_MAX))
        n_threads, n_threads_batch = threads.now()
        context_options = {
            "n_ctx": check_optional_int("n_ctx", n_ctx, 1, N_CTX_MAX) or 0,
            "n_batch": batch,
            "n_ubatch": ubatch,
            "n_seq_max": _n_seq_max,
            "n_threads": n_threads,
            "n_threads_batch": n_threads_batch,
        }
        model = _core.Model(
            str(check_gguf_file(model_path)),
            n_gpu_layers=check_int("n_gpu_layers", n_gpu_layers, -1),
            use_mmap=check_bool("use_mmap", use_mmap),
            use_mlock=check_bool("use_mlock", use_mlock),
            deterministic=deterministic,
            verbose=check_bool("verbose", verbose),
            progress=progress,
        )
        if model.has_encoder or not model.has_decoder:
            raise UnsupportedModelError(f"{model.description}: models with an encoder cannot read a stream")
        context = _core.Context(
            model,
            lminf=to_params(lminf, check_int("_n_rebase", _n_rebase, 0), deterministic),
            flash_attn=flash_attn,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            store_path=str(lminf.middle.path) if lminf and lminf.middle and lminf.middle.path else "",
            **context_options,
        )
        self._sequence = ModelSequence(model, context, None if lminf is not None else context.n_ctx, threads)
        self._n_ubatch = context.n_ubatch
        self._config = from_params(context.params, lminf.middle if lminf else None)
        self._cache_settings = {
            "n_ubatch": context.n_ubatch,
            "n_ctx": self.n_ctx,
            "n_rebase": _n_rebase,
            "cache_type_k": cache_type_k,
            "cache_type_v": cache_type_v,
        }

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str, **options: Any) -> Self:
        """Opens a model from Hugging Face, which is fetched first if it is not in huggingface_hub's cache.

        Args:
            repo_id: "owner/repository".
            filename: A GGUF file in it, or a pattern that one file matches, such as "*Q4_K_M.gguf".
            **options: Of `Llama`.

        Raises:
            TypeError: There is no such option.
            ConfigError, ModelLoadError: The file cannot be fetched; or as for `Llama`.
        """
        signature(cls).bind(Path(), **options)
        return cls(hugging_face.fetch(repo_id, filename), **options)

    @property
    def config(self) -> LMInfConfig | None:
        """The LM-Infinite parameters in use, every default filled in. None for plain llama.cpp."""
        return self._config

    @property
    def n_ctx(self) -> int | None:
        """Length at which the context is full, in tokens. None: never (LM-Infinite)."""
        return self._sequence.n_ctx

    @property
    def n_ctx_train(self) -> int:
        """Length that the model was trained on, in tokens."""
        return self._model.n_ctx_train

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary."""
        return self._model.n_vocab

    @property
    def description(self) -> str:
        """Architecture, size and quantisation in llama.cpp's words."""
        return self._model.description

    @property
    def metadata(self) -> dict[str, str]:
        """The GGUF file's metadata, arrays abbreviated."""
        return self._model.metadata

    @property
    def chat_template(self) -> str | None:
        """The GGUF file's own chat template (Jinja), if it has one."""
        return self._model.chat_template

    @property
    def model_name(self) -> str:
        """Name of the model file."""
        return Path(self._model.path).name

    @property
    def n_past(self) -> int:
        """Position of the next token, counted from 0 and not limited to 32 bits: the number of tokens seen.

        Safe to read while another thread computes; it then moves with each completed call into llama.cpp.
        """
        return self._sequence.n_past

    def tokenize(self, text: str | bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Splits a text into tokens.

        Args:
            text: The text; bytes are taken as UTF-8.
            add_bos: Put the model's begin-of-text token first if the model wants one (and, for the few models that want
                it, an end token last).
            special: Recognise special tokens such as `<|im_end|>` in the text. Leave it off for text you did not write.

        Returns:
            Token ids.
        """
        if not isinstance(text, str | bytes):
            raise TypeError(f"text must be str or bytes, not {type(text).__name__}")
        data = text.encode() if isinstance(text, str) else text
        return [int(token) for token in self._model.tokenize(data, add_bos, special)]

    def detokenize(self, tokens: TokenSequence, *, special: bool = False) -> str:
        """The text of some tokens; bytes that are no UTF-8, such as half a character, become U+FFFD.

        Args:
            tokens: Token ids.
            special: Spell special tokens out instead of leaving them away.
        """
        return self.detokenize_bytes(tokens, special=special).decode(errors="replace")

    def detokenize_bytes(self, tokens: TokenSequence, *, special: bool = False) -> bytes:
        """The text of some tokens as the bytes that they stand for."""
        return self._model.detokenize(self._to_tokens(tokens, allow_empty=True), False, special)

    def generate(
        self,
        prompt: str | bytes | TokenSequence = (),
        *,
        max_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        penalty_last_n: int = 64,
        logit_bias: Mapping[int, float] | None = None,
        grammar: str = "",
        seed: int | None = None,
        stop_at_end: bool = True,
        n_top_logprobs: int = 0,
        recall: Recall = False,
        show_recall: bool = False,
        speculate: Speculation | None = None,
    ) -> Iterator[GenerationStep]:
        """Appends a prompt to the sequence, then draws tokens one by one.

        With LM-Infinite the prompt may have any length: it is read through the window. A token is appended to the
        sequence before its step is handed out, so that the sequence always holds exactly the text that the caller
        has.

        Args:
            prompt: Text or token ids. Text gets the model's begin-of-text token only where the sequence begins, and
                special tokens in it are not recognised. Empty: go on after the last token of the sequence.
            max_tokens: Tokens to draw; -1 means without end.
            temperature: 0 takes the most probable token.
            top_k: Draw from the k most probable tokens; 0 means all.
            top_p: Draw from the most probable tokens that together have this probability.
            min_p: Draw from tokens at least this probable relative to the most probable one.
            repeat_penalty: Makes tokens that are among the last penalty_last_n less probable; 1 means no.
            frequency_penalty: The same, by occurrence.
            presence_penalty: The same, once.
            penalty_last_n: How many tokens back the penalties look, prompt included.
            logit_bias: Added to the logits of some tokens, by token id.
            grammar: GBNF with a rule named root, which the drawn text has to follow. "" is none.
            seed: Makes this call repeatable. None: the next one from the seed that the object was made with.
            stop_at_end: Stop when the model draws an end-of-generation token.
            n_top_logprobs: Look up this many of the most probable tokens at each step.
            recall: Whether prompt and drawn tokens look up middle tokens; see `eval`.
            show_recall: Tell with each step what the model has looked up.
            speculate: "lookup": where the text has gone on from the same words before, what came next is decoded ahead,
                and stays if it is what is drawn. The text is the same, and faster where it repeats itself.

        Returns:
            An iterator over the steps. The arguments are checked now; the prompt is read when the first step is asked
            for.

        Raises:
            ConfigError, ContextError, StateError: As for `eval`; a plain context may also become full between steps,
                another call may change the sequence between them, and a grammar may leave no token to draw.
        """
        options = SamplingOptions(
            grammar=grammar,
            logit_bias=logit_bias or {},
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            penalty_last_n=penalty_last_n,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
        )
        drawing = DrawOptions(
            max_tokens=check_int("max_tokens", max_tokens, -1),
            stop_at_end=check_bool("stop_at_end", stop_at_end),
            n_top_logprobs=check_int("n_top_logprobs", n_top_logprobs, 0),
            recall=RecallPlan(answering=self._recall_mode(recall)),
            n_recalled=N_RECALLED if check_bool("show_recall", show_recall) else 0,
            speculate=self._speculation(speculate),
        )
        seed = check_optional_int("seed", seed, 0, N_SEED_MAX)
        if isinstance(prompt, str | bytes):
            prompt = self.tokenize(prompt, add_bos=self.n_past == 0)
        tokens = self._to_tokens(prompt, allow_empty=self.n_past > 0)
        self._sequence.check_room(tokens.size)
        sampler = options.sampler(self._model, self._next_seed(seed))
        return draw_tokens(self._sequence, tokens, sampler, drawing)

    def _write(
        self, prompt: TokenSequence, options: TextOptions, *, fresh: bool = True, n_question: int | None = None
    ) -> Generator[TextPiece, None, None]:
        """Writes a text after a prompt. Arguments are checked now, nothing is computed before the first piece.

        Args:
            prompt: Token ids.
            options: How to write.
            fresh: The prompt replaces the sequence, of which a common beginning is kept. Otherwise it is appended.
            n_question: How many tokens at its end recall, if any do. None: all.
        """
        tokens = self._to_tokens(prompt, allow_empty=not fresh and self.n_past > 0)
        max_tokens = options.max_tokens
        if self.n_ctx is not None:
            n_past = 0 if fresh else self.n_past
            self._sequence.check_room(tokens.size + 1, n_past)
            room = self.n_ctx - n_past - tokens.size
            max_tokens = room if max_tokens < 0 else min(max_tokens, room)
        drawing = DrawOptions(
            max_tokens=max_tokens,
            n_top_logprobs=options.n_top_logprobs,
            check=options.check,
            fresh=fresh,
            recall=self._recall_plan(options.recall),
            n_question=n_question,
            n_recalled=options.n_recalled,
            speculate=self._speculation(options.speculate),
        )
        sampler = options.sampling.sampler(self._model, self._next_seed(options.seed))
        return write_text(draw_tokens(self._sequence, tokens, sampler, drawing), options)

    def last_recall(self, n: int = N_RECALLED) -> tuple[RecalledToken, ...]:
        """What the last token of the sequence looked up, if it did: the n heaviest tokens."""
        return self._sequence.recalled(check_int("n", n, 1))

    def reset(self) -> None:
        """Forgets the sequence: the next token is the first one."""
        self.truncate(0)

    def truncate(self, n_past: int) -> None:
        """Removes the end of the sequence, as if it had never been there.

        Args:
            n_past: Tokens to keep, from the beginning.

        Raises:
            ConfigError: There are not so many tokens.
            StateError: It would be cut to more than `n_rollback` tokens fewer than the longest it has been, and what
                they pushed out of the window is gone; or another thread computes. Nothing was changed.
        """
        check_int("n_past", n_past, 0, 2**63 - 1)
        with self._sequence.exclusive():
            self._sequence.truncate(n_past)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Saves the sequence, so that it can go on later with the very same logits and drawn tokens.

        The file takes its place in one step: until then an older one stays. It is as large as the used part of the
        cache, and only its owner can read it.

        Args:
            path: The file to write.

        Raises:
            StateError: The object is closed or computing, or the file cannot be written.
        """
        with self._sequence.exclusive():
            state = self._saved("llama")
        write_state_file(path, state)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Replaces the sequence by a saved one.

        It was saved by an object with the same model file, LM-Infinite parameters, cache types and `n_ubatch`; the
        numbers of threads may differ. With them, or on another machine, logits are the same up to rounding.

        Args:
            path: What `save_state` wrote.

        Raises:
            StateError: The file is missing, cut off, damaged, or of another version; or it was saved with another
                model or other parameters, which the message names; or this object is closed or computing. Nothing was
                changed.
        """
        file = read_state_file(path)
        with self._sequence.exclusive():
            self._restore(file, "llama")

    def _saved(self, kind: str, **extra: Any) -> StateFile:
        """The sequence and the state of the random numbers, with further JSON data. Only within `exclusive`."""
        extra["random"] = self._random.getstate()
        return state_file(kind, self._state_settings(), self._sequence.save(), extra)

    def _restore(self, file: StateFile, kind: str) -> None:
        """Replaces the sequence, if the file fits. Only within `exclusive`."""
        state = sequence_state(file, kind, self._state_settings())
        before = self._random.getstate()
        try:
            version, internal, gauss = file.header["random"]
            self._random.setstate((version, tuple(internal), gauss))
            self._sequence.load(state)
        except (LookupError, TypeError, ValueError) as error:
            raise StateError("the state's random numbers are damaged") from error
        except StateError:
            self._random.setstate(before)
            raise

    def _state_settings(self) -> dict[str, Any]:
        """What has to be the same for a state to go on."""
        return {
            "model": model_fingerprint(self._model.path),
            **config_settings(self._config),
            **self._cache_settings,
            "state version": _core.state_version(),
        }

    def memory_stats(self) -> MemoryStats:
        """What the object keeps of its sequence, and where that stands. Waits for a micro-batch being computed."""
        return self._sequence.memory_stats()

    def close(self) -> None:
        """Frees the model and the context, as soon as no other thread computes with them. Can be called again."""
        self._sequence.close()

    def __enter__(self) -> Llama:
        self._sequence.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _model(self) -> _core.Model:
        return self._sequence.model

    @property
    def _context(self) -> _core.Context:
        return self._sequence.context

    @cached_property
    def _chat_format(self) -> ChatFormat:
        return ChatFormat(self._model, self._chat_format_name)

    def _next_seed(self, seed: int | None) -> int:
        return self._random.randint(0, N_SEED_MAX) if seed is None else seed

    def _recall_mode(self, recall: Recall) -> int:
        return recall_mode(recall, has_store=self._has_store)

    def _recall_plan(self, scope: RecallScope | None) -> RecallPlan:
        return recall_plan(scope, has_store=self._has_store)

    def _speculation(self, speculate: Speculation | None) -> Speculation | None:
        """The way to guess, if this model can take back what was guessed wrong."""
        check_speculation(speculate)
        if speculate is None:
            return None
        if self._config is None:
            raise ConfigError(
                f"speculate = {speculate!r}: a plain context does not promise the same text; "
                "pass lminf=LMInfConfig(), or leave it away"
            )
        if self._model.is_hybrid:
            raise UnsupportedModelError(
                f"speculate = {speculate!r}: {self._model.description} has recurrent layers, whose state cannot take "
                "back what was guessed wrong"
            )
        return speculate

    @property
    def _has_store(self) -> bool:
        return self._config is not None and self._config.middle is not None

    def _to_tokens(self, tokens: TokenSequence, allow_empty: bool = False) -> TokenArray:
        return as_token_array(tokens, self._model.n_vocab, allow_empty=allow_empty)
