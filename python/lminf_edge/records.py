"""The typed records that `Llama` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RecalledToken:
    """A token that has left the window and was looked up.

    Attributes:
        position: Where it stands in the sequence.
        weight: Its share of the attention, summed over all layers and query heads that looked up.
        token: Its id, as far as the sequence is recorded (a million tokens).
        text: The text of this token alone.
    """

    position: int
    weight: float
    token: int | None
    text: str | None


@dataclass(frozen=True, kw_only=True)
class GenerationStep:
    """One generated token.

    Attributes:
        token: The token's id.
        text: The text that has become complete with this token. A character that several tokens spell arrives with
            the last of them; what is still incomplete at the end arrives as U+FFFD with the last step.
        logprob: Natural-log probability of the token by the model alone, before penalties, temperature and truncation.
            NaN in a `TextPiece` of a text for which nobody asked for probabilities.
        n_past: Position of the next token: the tokens that the sequence has seen, this one included unless it ended
            the text.
        tokens_per_second: Mean speed since the prompt was read.
        top_logprobs: The most probable tokens and their natural-log probabilities, descending, if asked for.
        finish_reason: None while the text goes on. "stop": this token is the model's end of generation; it is not
            part of the text and was not appended to the sequence. "length": max_tokens are reached.
        recall: What the model looked up to draw the token, the heaviest first, if asked for.
    """

    token: int
    text: str
    logprob: float
    n_past: int
    tokens_per_second: float
    finish_reason: Literal["stop", "length"] | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    recall: tuple[RecalledToken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """Some more of a text that is being written.

    Attributes:
        text: What can be shown now; may be empty. Never a part of a stop string.
        tokens: The tokens whose text has become complete with this piece.
        n_tokens: Tokens drawn so far, those of a stop string included.
        finish_reason: None while the text goes on. "stop": the model or a stop string ended it. "length": max_tokens
            are reached, or a plain context is full. "loop": it repeats itself.
    """

    text: str
    tokens: tuple[GenerationStep, ...]
    n_tokens: int
    finish_reason: Literal["stop", "length", "loop"] | None = None


@dataclass(frozen=True, kw_only=True)
class ChatUsage:
    """How much of a conversation the model still sees.

    Attributes:
        n_tokens: Tokens of the whole conversation, with all that the chat template writes.
        n_tokens_remembered: Those that the model sees, pinned ones included.
        n_tokens_forgotten: Those that have left the window.
        n_tokens_pinned: Those of the system prompt.
        n_messages: Questions and answers.
        n_messages_remembered: Those that the model sees.
    """

    n_tokens: int
    n_tokens_remembered: int
    n_tokens_forgotten: int
    n_tokens_pinned: int
    n_messages: int
    n_messages_remembered: int


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """What a `Llama` keeps of its sequence.

    Attributes:
        kv_bytes: Bytes of all key and value cells and sink token originals, allocated once.
        n_cells: Cells of the sequence: sink token copies and window ring, or the context length of plain llama.cpp.
        n_cells_used: Cells that hold something now.
        n_past: Position of the next token, which is the number of tokens seen.
        n_evicted: Tokens that have left the window and are not sink tokens.
        sink_distance: RoPE distance from the last token to the farthest sink token. None without sink tokens.
        n_placements: Times that the sink tokens were placed for a block; 0 where attention is our own.
        n_rebases: Times that positions were shifted back to keep RoPE's arithmetic exact.
        pos_physical: Position of the next token as RoPE will see it.
        window_fill: How much of the window, or of a plain context, is in use: 0 to 1.
        tokens_per_second: Mean speed of the last 1,024 drawn tokens. None before the first one.
        latency_p50: Seconds that half of them took at most.
        latency_p99: Seconds that 99 % of them took at most.
        resident_bytes: Memory of the whole process that is in RAM, mapped model files included.
        peak_resident_bytes: The most that it has been. None where the system does not say.
        n_stored: Tokens in the store of middle tokens, those in the window included.
        n_retrievable: Those that the next token could look up: they have left the window.
        store_bytes: Bytes that the stored tokens take, in memory or in a file.
        scan_seconds: Time spent on looking through the store.
        attention: Who computes it, for each layer: "own kernel (AVX2)", "llama.cpp's (latent attention)", with the
            instruction set or the reason; "none" for a layer without attention.
        n_drafted: Tokens that were decoded ahead because a lookup guessed them (`speculate`), since the model was
            opened.
        n_accepted: Those of them that were drawn.
    """

    kv_bytes: int
    n_cells: int
    n_cells_used: int
    n_past: int
    n_evicted: int
    sink_distance: int | None
    n_placements: int
    n_rebases: int
    pos_physical: int
    window_fill: float
    tokens_per_second: float | None
    latency_p50: float | None
    latency_p99: float | None
    resident_bytes: int
    peak_resident_bytes: int | None
    n_stored: int
    n_retrievable: int
    store_bytes: int
    scan_seconds: float
    attention: tuple[str, ...]
    n_drafted: int
    n_accepted: int


def by_layer(attention: Sequence[str]) -> str:
    """`MemoryStats.attention` in a few words, such as "own kernel (AVX2) in 30 layers"."""
    return ", ".join(f"{who} in {n} layer{'s' * (n > 1)}" for who, n in Counter(attention).items())
