"""Where the messages of a conversation stand in an endless sequence, and which of them have been forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["user", "assistant"]


@dataclass(kw_only=True)
class SpokenMessage:
    """A message and its tokens.

    Attributes:
        role: Who wrote it.
        content: Its text.
        tokens: As the model reads it, with what the template writes around the text.
        begin: Position of the first token, as long as the message is remembered.
        n_header: How many of its first tokens the end of the pinned ones can stand for.
        closed: Nothing will be added.
    """

    role: Role
    content: str
    tokens: list[int] = field(default_factory=list)
    begin: int = 0
    n_header: int = 0
    closed: bool = True

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.begin + len(self.tokens)

    def put_first(self) -> None:
        """It follows the pinned tokens, which stand for its header."""
        self.tokens = self.tokens[self.n_header :]
        self.begin += self.n_header
        self.n_header = 0


class Conversation:
    """Messages one after the other behind pinned tokens, the oldest of them forgotten.

    It keeps the books; whoever reads the tokens tells it how far the sequence has come. Positions count from 0.

    Attributes:
        messages: All messages, from the first one on.
        n_forgotten: How many of them, from the first one on, are not remembered any more.
    """

    def __init__(self, pinned: list[int], n_window: int, n_prompt: int) -> None:
        """No messages.

        Args:
            pinned: Tokens before the first message.
            n_window: Length of the local window.
            n_prompt: Tokens that begin an answer.
        """
        self.pinned = pinned
        self.messages: list[SpokenMessage] = []
        self.n_forgotten = 0
        self.n_window = n_window
        self._n_prompt = n_prompt
        self._begin = len(pinned)
        self._n_dropped_messages = 0
        self._n_dropped_tokens = 0

    @property
    def remembered(self) -> list[SpokenMessage]:
        """The messages that are not forgotten."""
        return self.messages[self.n_forgotten :]

    @property
    def end(self) -> int:
        """Position after the last token, once all are read."""
        return self.messages[-1].end if self.remembered else self._begin

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation, forgotten ones and pinned ones included."""
        n_kept = sum(len(message.tokens) for message in self.messages[self._n_dropped_messages :])
        return len(self.pinned) + self._n_dropped_tokens + n_kept

    def add(self, message: SpokenMessage) -> None:
        """Appends a message."""
        is_first = not self.remembered
        message.begin = self.end
        if is_first:
            message.put_first()
            message.begin = self.end
        self.messages.append(message)

    def drop_tokens(self) -> None:
        """What is forgotten for good, beyond the last question and answer, needs no tokens any more."""
        while self._n_dropped_messages < min(self.n_forgotten, len(self.messages) - 2):
            message = self.messages[self._n_dropped_messages]
            self._n_dropped_tokens += len(message.tokens)
            message.tokens = []
            self._n_dropped_messages += 1

    def remove_last(self, n: int) -> None:
        """Takes the last messages back."""
        del self.messages[len(self.messages) - n :]
        self.n_forgotten = min(self.n_forgotten, len(self.messages))

    def unread(self, n_past: int) -> list[int]:
        """Tokens of pinned and remembered messages from a position on."""
        tokens = self.pinned[n_past:]
        for message in self.remembered:
            tokens += message.tokens[max(0, n_past - message.begin) :]
        return tokens

    def n_to_forget(self, end: int) -> int:
        """How many of the oldest messages go before a token can be read whose window they do not fit.

        A message that the window cuts is forgotten as a whole, and with it the answer to it, unless nothing has
        been asked since. Only a message that is longer than the window itself is kept although it is cut.

        Args:
            end: Positions up to here, without it, are about to be read.
        """
        window_begin = end - self.n_window
        n = self.n_forgotten
        while n < len(self.messages) - 1:
            is_cut = self._is_cut(self.messages[n], window_begin)
            if not is_cut and self.messages[n].role == "user":
                break
            next_question = next((i for i in range(n + 1, len(self.messages)) if self.messages[i].role == "user"), None)
            if next_question is None and not is_cut:
                break
            n = n + 1 if next_question is None else next_question
        return n

    def _is_cut(self, message: SpokenMessage, window_begin: int) -> bool:
        is_long = len(message.tokens) + self._n_prompt > self.n_window
        return message.begin < window_begin and (not is_long or message.end <= window_begin)

    def forget(self, n: int, n_past: int) -> int | None:
        """Forgets the first n messages.

        Args:
            n: How many, from the first one on.
            n_past: How far the sequence has come.

        Returns:
            Where the sequence's window has to begin from now on. None: nothing of the other messages was read, and the
            window has to be emptied before.
        """
        first = self.messages[n]
        first.put_first()
        self.n_forgotten = n
        return first.begin if first.begin < n_past else None

    def place(self, begin: int | None = None) -> None:
        """The remembered messages, or those that will come, follow each other without a gap.

        Args:
            begin: Position of the first one. None: the end of the pinned tokens.
        """
        self._begin = position = len(self.pinned) if begin is None else begin
        for message in self.remembered:
            message.begin = position
            position = message.end

    def save(self) -> dict[str, Any]:
        """Everything as JSON data, but what the constructor was given."""
        return {
            "messages": [asdict(message) for message in self.messages],
            "n_forgotten": self.n_forgotten,
            "n_dropped": [self._n_dropped_messages, self._n_dropped_tokens],
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Takes over what `save` returned.

        Raises:
            LookupError, TypeError, ValueError: It was something else.
        """
        messages = [SpokenMessage(**message) for message in data["messages"]]
        self._n_dropped_messages, self._n_dropped_tokens = data["n_dropped"]
        self.messages, self.n_forgotten = messages, int(data["n_forgotten"])
