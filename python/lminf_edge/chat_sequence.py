"""A conversation in the sequence of a `Llama`: what is read, forgotten and taken back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import numpy as np

from lminf_edge._library import _core
from lminf_edge.chat_turns import TurnFormat
from lminf_edge.completion import Writing
from lminf_edge.conversation import Conversation, SpokenMessage
from lminf_edge.drawing import DrawOptions, draw_tokens
from lminf_edge.errors import StateError
from lminf_edge.llama import Llama
from lminf_edge.middle import RecallPlan
from lminf_edge.records import TextPiece
from lminf_edge.text_generation import TextOptions, write_text


class ChatSequence:
    """Keeps the sequence of a model and a conversation in step.

    Where the model stores middle tokens, what was forgotten stays in the store. It is lost only with the sequence, of
    which a conversation warns once.

    Attributes:
        conversation: What was said, and where it stands in the sequence.
        format: How turns are written.
    """

    def __init__(self, llm: Llama, turns: TurnFormat) -> None:
        """No messages, and nothing is computed yet.

        Args:
            llm: The model. Its sink tokens are the pinned ones.
            turns: How turns are written.
        """
        self._llm = llm
        self.format = turns
        self.conversation = empty_conversation(llm, turns)
        self._turn: int | None = None
        self._answering: SpokenMessage | None = None  # as long as it is not certain what stays of it
        self._n_valid = 0  # the sequence's tokens up to here are the conversation's
        self._has_warned = False

    # --- what is said

    def ask(self, content: str, tokens: list[int], *, instead: bool = False) -> None:
        """Adds a question and the beginning of its answer. Only within `changing`.

        Args:
            content: Text of the question.
            tokens: Its tokens.
            instead: Take the last question and its answer back before.
        """
        if instead:
            self._take_back(self.conversation.messages[-2].begin)
            self.conversation.remove_last(2)
            if not self.conversation.remembered:
                self._begin_again()
        self._close_answer()
        self.conversation.drop_tokens()
        self.conversation.add(SpokenMessage(role="user", content=content, tokens=tokens, n_header=self.format.n_header))
        self._begin_answer()

    def ask_again(self) -> None:
        """Takes the last answer back. Only within `changing`."""
        self._take_back(self.conversation.messages[-1].begin)
        self.conversation.remove_last(1)
        self._begin_answer()

    def reset(self) -> None:
        """Begins the conversation anew."""
        with self.changing():
            self.conversation = empty_conversation(self._llm, self.format)
            self._has_warned = False
            self._go_back(len(self.format.pinned))

    def replace(self, turns: TurnFormat, conversation: Conversation, restore: Callable[[], None]) -> None:
        """Goes on with another conversation.

        Args:
            turns: How its turns are written.
            conversation: Its messages.
            restore: Puts its tokens into the sequence, or raises and changes nothing.
        """
        with self._llm._sequence.exclusive() as turn:
            restore()
            self._turn, self._n_valid = turn, self._llm.n_past
            self._answering, self._has_warned = None, False
        self.format, self.conversation = turns, conversation

    def answer(
        self,
        begin: Callable[[], None],
        sampler: _core.Sampler,
        options: TextOptions,
        plan: RecallPlan,
        writing: Writing,
    ) -> Generator[TextPiece, None, None]:
        """Writes an answer.

        Args:
            begin: Says what is answered: `ask` or `ask_again`.
            sampler: Draws the tokens.
            options: When it ends.
            plan: What recalls.
            writing: Is told how many tokens are read.

        Raises:
            StateError: The model is closed or computing, or another call has changed its sequence.
        """
        sequence = self._llm._sequence
        with self.changing() as turn:
            begin()
            self._forget(self.conversation.end)
            # the last token is read (again) for its logits
            self._go_back(self.conversation.end - 1)
            self._n_valid = self.conversation.end
            prompt = self.conversation.unread(sequence.n_past)
            writing.n_prompt = len(prompt)
            message = self._answering = self.conversation.messages[-1]
        drawing = DrawOptions(
            max_tokens=options.max_tokens,
            n_top_logprobs=options.n_top_logprobs,
            check=options.check,
            before_append=lambda: self._forget(sequence.n_past + 1),
            turn=turn,
            recall=plan,
            n_question=self.conversation.end - self.conversation.messages[-2].begin,
            n_recalled=options.n_recalled,
            speculate=self._llm._speculation(options.speculate),
        )
        remembered = self.conversation.unread(0)
        sampler.accept(np.array(remembered[: len(remembered) - len(prompt)], np.int32))  # for the penalties
        steps = draw_tokens(sequence, np.array(prompt, np.int32), sampler, drawing)
        try:
            for piece in write_text(steps, options):
                message.content += piece.text
                message.tokens += [step.token for step in piece.tokens]
                yield piece
        finally:
            try:
                with sequence.exclusive(turn):
                    self._end_answer()
            except StateError:  # closed, or busy: the next turn will do it
                pass

    @contextmanager
    def changing(self) -> Iterator[int]:
        """The sequence is this session's, at most as long as its conversation; another one's is removed."""
        sequence = self._llm._sequence
        is_ours = sequence.turn == self._turn
        with sequence.exclusive() as self._turn:
            if not is_ours:
                self._read_again()
            self._end_answer()
            if sequence.n_past <= len(self.conversation.pinned):
                self.conversation.place()  # an interrupted recurrent model has lost its sequence
                self._warn_of_loss()
            yield self._turn

    def _begin_answer(self) -> None:
        self.conversation.add(
            SpokenMessage(role="assistant", content="", tokens=list(self.format.prompt), closed=False)
        )

    def _close_answer(self) -> None:
        if self.conversation.messages and not self.conversation.messages[-1].closed:
            self.conversation.messages[-1].tokens += self.format.closing
            self.conversation.messages[-1].closed = True

    def _end_answer(self) -> None:
        """Makes the tokens of an answer those of its text, which may end in the middle of a drawn token or character.

        What else was drawn, such as the tokens of a stop string, does not stay in the sequence.
        """
        message, self._answering = self._answering, None
        if message is not None:
            content, n_prompt = message.content.encode(), len(self.format.prompt)
            position = n_bytes = 0
            n_tokens = n_prompt
            for number, token in enumerate(message.tokens[n_prompt:], n_prompt + 1):
                piece = self._llm._model.token_to_piece(token, False)
                if not content.startswith(piece, position):
                    break
                position += len(piece)
                if not 0x80 <= (content[position:] or b" ")[0] < 0xC0:  # not in the middle of a character
                    n_bytes, n_tokens = position, number
            self._n_valid = message.begin + n_tokens
            message.tokens = message.tokens[:n_tokens] + self.format.text(content[n_bytes:].decode())
        self._go_back(self._n_valid)

    def _take_back(self, position: int) -> None:
        """Goes back in the conversation; a question that was forgotten while it was answered comes back with it."""
        question, answer = self.conversation.messages[-2:]
        if self.conversation.n_forgotten > len(self.conversation.messages) - 2:
            self.conversation.n_forgotten = len(self.conversation.messages) - 2
            if self._llm._has_store:
                self._go_back(answer.begin)
            question.put_first()
            self._begin_again()
        else:
            self._go_back(position)

    def _forget(self, end: int) -> None:
        """Forgets the messages that the window would cut at the tokens before `end`."""
        conversation, sequence = self.conversation, self._llm._sequence
        n = conversation.n_to_forget(end)
        if n == conversation.n_forgotten:
            return
        window_begin = conversation.forget(n, sequence.n_past)
        if window_begin is None:
            self._begin_again()
        else:
            sequence.forget(window_begin)

    def _begin_again(self) -> None:
        """The pinned tokens alone are seen; what is remembered will be read after them.

        With a store the sequence goes on where it is: going back would empty the store.
        """
        sequence, n_pinned = self._llm._sequence, len(self.conversation.pinned)
        if not self._llm._has_store or sequence.n_past <= n_pinned:
            self.conversation.place()
            self._go_back(n_pinned)
            return
        try:
            sequence.forget_all()
        except StateError:
            self._read_again()
        else:
            self.conversation.place(sequence.n_past)

    def _go_back(self, n_past: int) -> None:
        """Cuts the sequence; where that cannot be done exactly, everything that is remembered will be read again."""
        sequence = self._llm._sequence
        if sequence.n_past <= n_past:
            return
        try:
            sequence.truncate(n_past)
        except StateError:
            self._read_again()

    def _read_again(self) -> None:
        """The sequence is given up; what is remembered will be read anew."""
        self._warn_of_loss()
        self.conversation.place()
        self._llm._sequence.truncate(0)

    def _warn_of_loss(self) -> None:
        """Messages that are forgotten cannot be looked up any more."""
        if self._llm._has_store and self.conversation.n_forgotten > 0 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the first {self.conversation.n_forgotten} messages of the conversation cannot be looked up any more: "
                "its sequence had to begin anew (something else has used the model, or it cannot go back exactly)",
                stacklevel=2,
            )


def empty_conversation(llm: Llama, turns: TurnFormat) -> Conversation:
    """A conversation without messages for the window of a model."""
    assert llm.config is not None and llm.config.n_window is not None
    return Conversation(turns.pinned, llm.config.n_window, len(turns.prompt))
