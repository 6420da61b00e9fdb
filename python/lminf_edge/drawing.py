"""Tokens are read and drawn one after the other."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from lminf_edge._library import _core
from lminf_edge.middle import NO_RECALL, RecallPlan
from lminf_edge.records import GenerationStep
from lminf_edge.sequence import ModelSequence
from lminf_edge.speculation import N_DRAFT, N_REMEMBERED, LookupDrafts, Speculation
from lminf_edge.tokens import TokenArray


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How long to draw.

    Attributes:
        max_tokens: Tokens to draw; -1 means without end.
        stop_at_end: Stop at an end-of-generation token.
        n_top_logprobs: How many of the most probable tokens to look up at each step. None: no probability is computed,
            not even that of the drawn token.
        check: Called between tokens, and about every 50 ms while the prompt is read; what it raises ends the drawing.
        fresh: The prompt replaces the sequence instead of being appended to it.
        before_append: Called before a drawn token is appended, while nobody else can change the sequence.
        turn: Of `ModelSequence.exclusive`, if the caller has begun to change the sequence.
        recall: How prompt and drawn tokens recall.
        n_question: How many of the last tokens of the prompt are the question. None: all.
        n_recalled: How many of the tokens that were looked up are told with each step.
        speculate: How tokens are guessed that are decoded ahead. None: none are.
    """

    max_tokens: int
    stop_at_end: bool = True
    n_top_logprobs: int | None = None
    check: Callable[[], object] | None = None
    fresh: bool = False
    before_append: Callable[[], object] | None = None
    turn: int | None = None
    recall: RecallPlan = NO_RECALL
    n_question: int | None = None
    n_recalled: int = 0
    speculate: Speculation | None = None


def draw_tokens(
    sequence: ModelSequence, prompt: TokenArray, sampler: _core.Sampler, options: DrawOptions
) -> Iterator[GenerationStep]:
    """Reads a prompt, then draws tokens. Each is in the sequence before its step is handed out.

    Args:
        sequence: The sequence.
        prompt: Token ids to append first.
        sampler: How to draw.
        options: How long to draw.
    """
    with sequence.exclusive(options.turn) as turn:
        n_question = prompt.size if options.n_question is None else min(options.n_question, prompt.size)
        n_read = prompt.size - n_question if options.recall.answering else prompt.size
        # a question that was read before was perhaps none then, and looked nothing up
        n_kept = sequence.keep_common_beginning(prompt, n_read) if options.fresh else 0
        for part, recall in (
            (prompt[n_kept:n_read], options.recall.reading),
            (prompt[n_read:], options.recall.answering),
        ):
            if part.size:
                sequence.append(part, options.check, recall)
        drafts = LookupDrafts(sequence.newest_tokens(N_REMEMBERED), sequence.draft_costs) if options.speculate else None
    sampler.accept(prompt)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start = time.perf_counter()
    n_drawn = 0
    while n_drawn != options.max_tokens:
        if options.check is not None:
            options.check()
        with sequence.exclusive(turn):
            begin = time.perf_counter()
            recalled = sequence.recalled(options.n_recalled) if options.n_recalled else ()
            token, logprob, top = sampler.sample(sequence.context, options.n_top_logprobs)
            ended = options.stop_at_end and sequence.model.is_eog(token)
            if not ended:
                sequence.check_room(1)
                if options.before_append is not None:
                    options.before_append()
                n_left = options.max_tokens - n_drawn - 1 if options.max_tokens >= 0 else N_DRAFT
                _append(sequence, token, options, drafts, n_left)
                sequence.token_times.add(time.perf_counter() - begin)
        n_drawn += 1
        final = ended or n_drawn == options.max_tokens
        piece = b"" if ended else sequence.model.token_to_piece(token, False)
        yield GenerationStep(
            token=token,
            text=decoder.decode(piece, final=final),
            logprob=logprob,
            n_past=sequence.n_past,
            tokens_per_second=n_drawn / (time.perf_counter() - start),
            finish_reason=("stop" if ended else "length") if final else None,
            top_logprobs=tuple(top),
            recall=recalled,
        )
        if ended:
            return


def _append(
    sequence: ModelSequence, token: int, options: DrawOptions, drafts: LookupDrafts | None, n_left: int
) -> None:
    """Appends a drawn token, after which n_left others may be drawn. It may have been decoded ahead."""
    recall = options.recall.answering
    if drafts is None:
        sequence.append(np.array([token], np.int32), options.check, recall)
        return
    drafts.feed(token)
    if sequence.advance(token, recall):
        return
    draft = drafts.draft(n_left)
    if options.stop_at_end:  # an end is not appended
        draft = list(takewhile(lambda drafted: not sequence.model.is_eog(drafted), draft))
    begin = time.perf_counter()
    n_ahead = sequence.append_ahead(np.array([token, *draft], np.int32), options.check, recall)
    sequence.draft_costs.add(n_ahead, time.perf_counter() - begin)
