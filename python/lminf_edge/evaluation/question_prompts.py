"""From a question and its text to the tokens that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lminf_edge._library import _core
from lminf_edge.chat_prompt import ChatFormat
from lminf_edge.errors import ConfigError
from lminf_edge.evaluation.filler import Filler
from lminf_edge.evaluation.questions import Question
from lminf_edge.tokens import TokenArray

_TASK = "Read the text and answer the question about it in a few words of the text.\n\nText:\n"
_QUESTION = "\n\nQuestion: "
_ANSWER = "Answer:"

_CONTEXT = "\ufdd3"  # Unicode guarantees that this is no character


@dataclass(frozen=True, kw_only=True, eq=False)
class QuestionPrompt:
    """A question with all that is around it.

    Attributes:
        question: The question.
        before: Tokens before the text.
        passage: Tokens of the text, or of the passage that the answer is in.
        after: Tokens behind the text.
        length: Length that the prompt is made, in tokens. None: the text is taken as it is.
        depth: Share of the filler that should be before the passage. None: there is no filler.
        filler: What the passage is put into.
        first: First token of the filler.
    """

    question: Question
    before: TokenArray
    passage: TokenArray
    after: TokenArray
    length: int | None = None
    depth: float | None = None
    filler: Filler | None = None
    first: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """See `Prompt`."""
        return {"id": self.question.id, "length": self.length}

    @property
    def n_needed(self) -> int:
        """Tokens without any filler."""
        return len(self.before) + len(self.passage) + len(self.after)

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return self.n_needed if self.length is None else self.length

    @property
    def n_question(self) -> int:
        """Tokens behind the text, which ask."""
        return len(self.after)

    @property
    def n_before(self) -> int:
        """Tokens of filler before the passage."""
        if self.filler is None or self.depth is None:
            return 0
        n_filler = self.n_tokens - self.n_needed
        return self.filler.gap(n_filler, self.first, round(self.depth * n_filler))

    def in_window(self, n_window: int) -> bool | None:
        """Whether a local window at the prompt's end holds the whole passage. None: nobody knows where that is."""
        if self.filler is None:
            return None
        return self.n_tokens - len(self.before) - self.n_before < n_window

    def tokens(self) -> TokenArray:
        """The prompt, int32 [n_tokens]."""
        parts = [self.before, self.passage, self.after]
        if self.filler is not None:
            filler = self.filler.part(self.n_tokens - self.n_needed, self.first)
            parts = [self.before, filler[: self.n_before], self.passage, filler[self.n_before :], self.after]
        return np.concatenate(parts, dtype=np.int32)


class PromptFormat:
    """How a model is asked: through its chat template if its file has one."""

    def __init__(self, vocabulary: _core.Model) -> None:
        """Finds the template.

        Args:
            vocabulary: The model, whose weights are not needed.

        Raises:
            UnsupportedModelError: The template cannot be used.
        """
        self._vocabulary = vocabulary
        self._chat = ChatFormat(vocabulary) if vocabulary.chat_template is not None else None

    def around(self, question: str) -> tuple[TokenArray, TokenArray]:
        """The tokens before and behind the text that a question is about.

        Raises:
            ConfigError: The chat template does not show a message as it is.
        """
        if self._chat is None:
            return self.tokens(_TASK, begins=True), self.tokens(f"{_QUESTION}{question}\n{_ANSWER}")
        content = f"{_TASK}{_CONTEXT}{_QUESTION}{self._chat.guard(question)}"
        parts = self._chat.render([{"role": "user", "content": content}]).split(_CONTEXT)
        if len(parts) != 2:
            raise ConfigError("the model's chat template does not show the user's message as it is")
        return (
            np.array(self._chat.tokenize(parts[0], begins=True), np.int32),
            np.array(self._chat.tokenize(parts[1] + _ANSWER), np.int32),
        )

    def tokens(self, text: str, *, begins: bool = False) -> TokenArray:
        """The tokens of a plain text.

        Args:
            text: The text. Control tokens that it spells out are read as text.
            begins: The sequence begins here.
        """
        return self._vocabulary.tokenize(text.encode(), begins, False)


def prompt_as_it_comes(form: PromptFormat, question: Question) -> QuestionPrompt:
    """A question about its whole text."""
    before, after = form.around(question.question)
    return QuestionPrompt(question=question, before=before, passage=form.tokens(question.context), after=after)


def prompt_in_filler(
    form: PromptFormat, question: Question, filler: Filler, *, length: int, depth: float, first: int
) -> QuestionPrompt:
    """A question about a longer text, which holds its passage somewhere.

    Args:
        form: How the model is asked.
        question: The question.
        filler: What the rest of the text consists of.
        length: Length of the prompt in tokens.
        depth: Share of the filler that should be before the passage.
        first: First token of the filler.

    Raises:
        ConfigError: The length has no room for passage and question.
    """
    before, after = form.around(question.question)
    passage = form.tokens(f"\n\n{question.context}\n\n")
    prompt = QuestionPrompt(
        question=question,
        before=before,
        passage=passage,
        after=after,
        length=length,
        depth=depth,
        filler=filler,
        first=first,
    )
    if prompt.n_needed > length:
        raise ConfigError(
            f"lengths: {length} tokens have no room for question {question.id}, which takes {prompt.n_needed} "
            "with its passage"
        )
    return prompt


def by_length(prompts: Sequence[QuestionPrompt]) -> list[list[QuestionPrompt]]:
    """Prompts as they come, in groups: lengths from one power of two up to the next."""
    groups: dict[int, list[QuestionPrompt]] = {}
    for prompt in prompts:
        groups.setdefault(length_range(prompt.n_tokens)[0], []).append(prompt)
    return [groups[low] for low in sorted(groups)]


def length_range(n_tokens: int) -> tuple[int, int]:
    """The power of two that is not above a length, and the last length before the next one."""
    low = 1 << (n_tokens.bit_length() - 1)
    return low, 2 * low - 1
