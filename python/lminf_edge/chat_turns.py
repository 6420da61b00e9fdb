"""How a chat template writes a conversation down turn by turn, so that each turn adds its own tokens only."""

from __future__ import annotations

from collections.abc import Sequence

from lminf_edge.chat_prompt import ChatFormat
from lminf_edge.chat_template import Message
from lminf_edge.errors import ConfigError

# Contents that are found again in a rendered text: Unicode guarantees that these are no characters.
_QUESTION, _ANSWER, _NEXT = "\ufdd3", "\ufdd4", "\ufdd5"


class TurnFormat:
    """The tokens of a system prompt, of questions and of answers, each by itself.

    Some templates have no place for a system prompt but the first question: `<question> system, question`. Then what is
    pinned ends within that first message, and any later question can stand in its place without its own header. The
    same holds where nothing comes before the first question: something has to be pinned.

    Attributes:
        pinned: Tokens before the first question that stay the same whatever is asked.
        prompt: Tokens that begin an answer.
        closing: Tokens that end an answer.
        n_header: How many tokens of a question the end of `pinned` can stand for.
    """

    def __init__(
        self, chat_format: ChatFormat, system: str | None = None, tools: Sequence[object] | None = None
    ) -> None:
        """Finds out how the template writes turns.

        Args:
            chat_format: The model's chat format.
            system: The system prompt. None: the template's own, if it has one.
            tools: Descriptions of functions, which templates put beside the system prompt.

        Raises:
            ConfigError: The template refuses a system prompt or tools, or what it makes of a message depends on those
                after it.
        """
        self._format = chat_format
        self._tools = tools
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        before, after = self._around(_QUESTION, [_question(_QUESTION)])
        header, self._closing_text = self._header_and_closing()
        stands_alone = before.endswith(header) and before != header
        self._pinned_text = before[: len(before) - len(header)] if stands_alone else before
        self._header = "" if stands_alone else header
        self.pinned = chat_format.tokenize(self._pinned_text, begins=True)
        self.closing = chat_format.tokenize(self._closing_text)
        self.n_header = len(chat_format.tokenize(self._header))
        asked = f"{before}{_QUESTION}{after}"
        text = self._render([_question(_QUESTION)], add_generation_prompt=True)
        self.prompt = chat_format.tokenize(_rest(text, asked))
        if not self._render(self._exchange(_NEXT)).startswith(self._pinned_text):
            raise _changing()

    def tokens(self) -> list[list[int]]:
        """All tokens that do not depend on what is said: they tell formats apart."""
        return [self.pinned, self.prompt, self.closing]

    def text(self, text: str) -> list[int]:
        """Tokens of a part of a message."""
        return self._format.tokenize(self._format.guard(text))

    def question(self, text: str) -> list[int]:
        """Tokens of a question, its header included."""
        rendered = self._render(self._exchange(self._format.guard(text)))
        rest = _rest(rendered.partition(_ANSWER)[2], self._closing_text)
        return self._format.tokenize(self._header) + self._format.tokenize(_rest(rest, self._header))

    def _header_and_closing(self) -> tuple[str, str]:
        """What stands before a later question, and what stands at the end of an answer."""
        _, closing = self._around(_ANSWER, self._exchange(None))
        between = self._around(_ANSWER, self._exchange(_NEXT))[1].partition(_NEXT)[0]
        return _rest(between, closing), closing

    def _exchange(self, following: str | None) -> list[Message]:
        messages = [_question(_QUESTION), {"role": "assistant", "content": _ANSWER}]
        return messages if following is None else [*messages, _question(following)]

    def _around(self, mark: str, messages: Sequence[Message]) -> tuple[str, str]:
        before, found, after = self._render(messages).rpartition(mark)
        if not found:
            raise ConfigError("the model's chat template does not show every message")
        return before, after

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        opening = [{**message, "content": self._format.guard(message["content"])} for message in self._opening]
        return self._format.render(
            [*opening, *messages], tools=self._tools, add_generation_prompt=add_generation_prompt
        )


def _question(content: str) -> Message:
    return {"role": "user", "content": content}


def _rest(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise _changing()
    return text[len(beginning) :]


def _changing() -> ConfigError:
    return ConfigError("the model's chat template writes messages differently once others follow them")
