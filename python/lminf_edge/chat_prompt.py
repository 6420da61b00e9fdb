"""From a conversation to the tokens that a model reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lminf_edge._library import _core
from lminf_edge.chat_template import BuiltinTemplate, ChatTemplate, JinjaTemplate, Message, builtin_template_names
from lminf_edge.errors import ConfigError, UnsupportedModelError

_OPEN, _CLOSE, _ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"  # Unicode guarantees that these are no characters
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class ChatFormat:
    """A model's way to write a conversation down.

    Control tokens that a message spells out, such as `<|im_end|>`, are read as the text that they are: nobody who
    writes a message can end it and begin another one in somebody else's name.
    """

    def __init__(self, model: _core.Model, name: str | None = None) -> None:
        """Finds the template.

        Args:
            model: The model whose tokens are made.
            name: One of llama.cpp's formats. None: the template in the model file.

        Raises:
            ConfigError: llama.cpp has no format of that name.
            UnsupportedModelError: The model has no template, or one that cannot be used.
        """
        self._model = model
        self._template = _find_template(model, name)
        spellings = [text.decode(errors="replace") for text in model.control_tokens]
        self._guarded = [_OPEN, *sorted({text for text in spellings if text}, key=len, reverse=True)]
        self._guarded_pattern = re.compile("|".join(map(re.escape, self._guarded)))
        self._guarded_index = {text: index for index, text in enumerate(self._guarded)}

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[object] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, for a reader: `tokens` is what a model should read.

        Args:
            messages: Messages as `check_messages` returns them.
            tools: Descriptions of functions that the model may call.
            add_generation_prompt: End with the beginning of the assistant's next message.

        Raises:
            ConfigError: The template refuses the messages, or takes no tools.
        """
        return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def tokens(
        self, messages: Sequence[Message], *, tools: Sequence[object] | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """The tokens of a conversation; begins with the model's begin-of-text token if the model wants one.

        Args and errors are those of `render`.
        """
        return self.added_tokens(messages, 0, tools=tools, add_generation_prompt=add_generation_prompt)

    def added_tokens(
        self,
        messages: Sequence[Message],
        n_before: int,
        *,
        tools: Sequence[object] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The tokens that messages add to those before them, so that a conversation can go on where it is.

        Args:
            messages: The conversation with the new messages.
            n_before: How many messages at the beginning are not new.
            tools: See `render`.
            add_generation_prompt: See `render`.

        Raises:
            ConfigError: As for `render`; or the template writes the first messages differently once others follow.
        """
        guarded = _mapped(messages, self.guard)
        text = self.render(guarded, tools=tools, add_generation_prompt=add_generation_prompt)
        if n_before == 0:
            return self.tokenize(text, begins=True)
        return self.tokenize(_rest(text, self.render(guarded[:n_before], tools=tools, add_generation_prompt=False)))

    def closing_tokens(self, messages: Sequence[Message], *, tools: Sequence[object] | None = None) -> list[int]:
        """The tokens that end the assistant's answer to a conversation, after its text.

        Args:
            messages: The conversation, without the answer.
            tools: See `render`.

        Raises:
            ConfigError: As for `render`; or the template does not show answers.
        """
        guarded = _mapped(messages, self.guard)
        answered = [*guarded, {"role": "assistant", "content": _ANSWER}]
        text = self.render(answered, tools=tools, add_generation_prompt=False)
        if _ANSWER not in text:
            raise ConfigError("the model's chat template does not show the assistant's answers")
        return self.tokenize(text.rpartition(_ANSWER)[2])

    def segments(
        self, messages: Sequence[Message], *, tools: Sequence[object] | None = None, add_generation_prompt: bool = True
    ) -> list[list[int]]:
        """The tokens of each message, and of the beginning of the answer if asked for.

        One after the other they are what the model reads; each begins where its message does.

        Returns:
            A list of tokens for each message, and one more with add_generation_prompt.

        Raises:
            ConfigError: As for `render`; or what the template makes of a message depends on those after it.
        """
        result = [
            self.added_tokens(messages[: n + 1], n, tools=tools, add_generation_prompt=False)
            for n in range(len(messages))
        ]
        if add_generation_prompt:
            result.append(self.added_tokens(messages, len(messages), tools=tools))
        return result

    def _beginning(self, text: str) -> list[int]:
        """The begin-of-text token, unless the template has written it."""
        bos = self._model.bos
        wanted = self._model.add_bos and bos >= 0 and not text.startswith(_spelling(self._model, bos))
        return [bos] if wanted else []

    def guard(self, text: str) -> str:
        """A text in which control tokens that it spells out are marked, for `tokenize` to read them as text."""
        return self._guarded_pattern.sub(lambda found: f"{_OPEN}{self._guarded_index[found[0]]}{_CLOSE}", text)

    def tokenize(self, text: str, *, begins: bool = False) -> list[int]:
        """The tokens of a rendered text whose messages went through `guard`.

        Args:
            text: The text, or a part of it that neither cuts a mark nor a control token.
            begins: The sequence begins here: with the model's begin-of-text token if the model wants one.
        """
        tokens = self._beginning(text) if begins else []
        for number, part in enumerate(_MARK.split(text)):
            is_mark = number % 2 == 1
            piece = self._guarded[int(part)] if is_mark else part
            if piece:
                tokens += self._model.tokenize(piece.encode(), False, not is_mark).tolist()
        return tokens


def _rest(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise ConfigError("the model's chat template writes messages differently once others follow them")
    return text[len(beginning) :]


def check_messages(messages: object) -> list[Message]:
    """Makes plain data of a conversation, so that a template meets nothing else.

    Args:
        messages: Mappings with a "role", and a "content" that is text, a list of text parts, or None. Other entries,
            such as "tool_calls", are the template's business.

    Returns:
        The messages as dictionaries, with text contents.

    Raises:
        TypeError: This is no sequence of such mappings.
        ConfigError: There are no messages, or one lacks what it needs.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of dictionaries, not {type(messages).__name__}")
    if not messages:
        raise ConfigError("messages is empty: at least one message is needed")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def check_tools(tools: object) -> list[object] | None:
    """Makes plain data of descriptions of functions.

    Raises:
        TypeError: This is no sequence of mappings.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise TypeError(f"tools must be a list of dictionaries, not {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TypeError(f"tools[{index}] must be a dictionary, not {type(tool).__name__}")
    return [_plain(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _check_message(message: object, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise TypeError(f"{name} must be a dictionary, not {type(message).__name__}")
    plain: Message = _plain(message, name)
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise ConfigError(f"{name}['role'] = {role!r}: must be a string such as 'user'")
    if "content" not in plain and "tool_calls" not in plain:
        raise ConfigError(f"{name}: has no 'content'")
    plain["content"] = _content(plain.get("content"), f"{name}['content']")
    return plain


def _content(content: object, name: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError(f"{name} must be text, a list of parts or None, not {type(content).__name__}")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ConfigError(f"{name}: only parts {{'type': 'text', 'text': ...}} are supported")
        texts.append(part["text"])
    return "\n".join(texts)


def _plain(value: object, name: str) -> Any:
    """A copy that consists of nothing but JSON's types."""
    try:
        return _plain_part(value, name)
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply") from error


def _plain_part(value: object, name: str) -> Any:
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, str):
        # half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name}: the key {key!r} must be a string")
        return {str(key): _plain_part(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_part(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{name}: {type(value).__name__} is no JSON data")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same data with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _find_template(model: _core.Model, name: str | None) -> ChatTemplate:
    if name is not None:
        return BuiltinTemplate(name)
    source = model.chat_template
    if source is None:
        raise UnsupportedModelError(
            "the model file has no chat template; if you know the model's format, pass it as chat_format: "
            + ", ".join(builtin_template_names())
        )
    bos, eos = (_spelling(model, token) for token in (model.bos, model.eos))
    return JinjaTemplate(source, bos_token=bos, eos_token=eos)


def _spelling(model: _core.Model, token: int) -> str:
    return model.token_to_piece(token, True).decode(errors="replace") if token >= 0 else ""
