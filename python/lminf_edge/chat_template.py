"""How messages become the text that a chat model was trained on: the model's own Jinja template, or one of llama.cpp's.

A template comes with a model file from anywhere, so it is a program by a stranger. It runs in Jinja's immutable sandbox
(llama-cpp-python once ran it without: CVE-2024-34359), sees plain data only, and cannot run or grow without end.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lminf_edge._checks import check_choice
from lminf_edge._library import _core
from lminf_edge.errors import ConfigError, UnsupportedModelError

Message = dict[str, Any]
"""A message as plain data: "role", "content" and whatever else the template knows."""

N_STEPS_MAX = 250_000
"""Rounds of loops and calls of macros in one rendering."""

N_SECONDS_MAX = 10.0
"""Time that one rendering may take."""

N_REPEATED_MAX = 100_000
"""Length of what the operator * may make of a string or list."""

N_TEXT_MAX = 2**26
"""Length of a rendered text, and of what + and ~ may make, in characters."""


class ChatTemplate(Protocol):
    """Renders a conversation as text."""

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[object] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation.

        Args:
            messages: The conversation so far.
            tools: Descriptions of functions that the model may call, in the form that it was trained on.
            add_generation_prompt: End with the beginning of the assistant's next message.

        Raises:
            ConfigError: The template refuses the messages, or takes no tools.
        """
        ...


class BuiltinTemplate:
    """One of the formats that llama.cpp knows by name, such as "chatml" or "llama3"."""

    def __init__(self, name: str) -> None:
        """Looks the format up.

        Args:
            name: One of `builtin_template_names`.

        Raises:
            ConfigError: There is no such format.
        """
        check_choice("chat_format", name, builtin_template_names())
        self._name = name

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[object] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """See `ChatTemplate.render`."""
        if tools:
            raise ConfigError(f"tools: llama.cpp's chat format {self._name!r} takes none")
        pairs = [(str(message["role"]), message.get("content") or "") for message in messages]
        return _core.apply_chat_template(self._name, pairs, add_generation_prompt)


def builtin_template_names() -> list[str]:
    """Names of the chat formats that llama.cpp knows."""
    return _core.builtin_chat_templates()


class JinjaTemplate:
    """A chat template from a GGUF file."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Compiles a template.

        Args:
            source: Jinja, as in the metadata tokenizer.chat_template.
            bos_token: Spelling of the model's begin-of-text token.
            eos_token: Spelling of its end-of-text token.

        Raises:
            UnsupportedModelError: It is no valid template.
        """
        self._environment = _Environment()
        try:
            tree = _with_limits(self._environment, self._environment.parse(source))
            code = self._environment.compile(tree)
            self.takes_tools = any(name.name == "tools" for name in tree.find_all(nodes.Name))
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.globals)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise UnsupportedModelError(f"the model's chat template cannot be used: {_reason(error)}") from error
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[object] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """See `ChatTemplate.render`."""
        if tools and not self.takes_tools:
            raise ConfigError("tools: this model's chat template takes none")
        variables = {
            **self._variables,
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        self._environment.limits.restart()
        try:
            return self._environment.limits.join(self._template.generate(variables))
        except RefusedError as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # the sandbox lets anything through that an operation on plain data can raise
            raise ConfigError(f"the model's chat template failed: {_reason(error)}") from error


class RefusedError(jinja2.TemplateError):
    """A template called raise_exception()."""


class _Limits(Extension):
    """Counts a template's steps and the sizes of its texts. `_with_limits` weaves calls of it into the template."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.restart()

    def restart(self) -> None:
        self._n_steps = 0
        self._deadline = time.monotonic() + N_SECONDS_MAX

    def step(self) -> bool:
        self._n_steps += 1
        if self._n_steps > N_STEPS_MAX or time.monotonic() > self._deadline:
            raise SecurityError("it takes too long")
        return True

    def join(self, parts: Any) -> str:
        texts, n = [], 0
        for part in parts:
            texts.append(str(part))
            n += len(texts[-1])
            if n > N_TEXT_MAX:
                raise SecurityError("its text is too long")
        return "".join(texts)


class _Generation(Extension):
    """The tag `generation`, with which templates mark the assistant's words for training; it shows its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it without ClassVar

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for, which is Hugging Face's."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation, _Limits]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.limits: _Limits = self.extensions[_Limits.identifier]  # type: ignore[assignment]
        for name in ("center", "indent"):
            self.filters[name] = _with_small_numbers(self.filters[name])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call(self, context: Any, function: Any, *arguments: Any, **options: Any) -> Any:
        _check_small(arguments)  # widths, for one
        return super().call(context, function, *arguments, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuses what could make numbers or texts of any size."""
        sizes = [len(value) if isinstance(value, str | list | tuple) else None for value in (left, right)]
        integers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"the operator {operator} is not allowed here")
        if any(abs(value) > 2**64 for value in integers):
            raise SecurityError("a number is too large")
        if (
            operator == "*"
            and any(sizes)
            and integers
            and max(sizes[0] or 0, sizes[1] or 0) * integers[0] > (N_REPEATED_MAX)
        ):
            raise SecurityError("a repetition is too long")
        if operator == "+" and (sizes[0] or 0) + (sizes[1] or 0) > N_TEXT_MAX:
            raise SecurityError("a text is too long")
        return super().call_binop(context, operator, left, right)


def _with_limits(environment: _Environment, template: nodes.Template) -> nodes.Template:
    """Makes each round of a loop and each call of a macro count as a step, and lets ~ check its length."""

    def call(method: str, place: nodes.Node, *arguments: nodes.Expr) -> nodes.Call:
        node = nodes.Call(environment.limits.attr(method), list(arguments), [], None, None)
        node.set_lineno(place.lineno)
        return node

    loops = list(template.find_all(nodes.For))
    repeating: list[nodes.For | nodes.Macro | nodes.CallBlock]
    repeating = [*loops, *template.find_all(nodes.Macro), *template.find_all(nodes.CallBlock)]
    for repeated in repeating:
        repeated.body.insert(0, nodes.ExprStmt(call("step", repeated), lineno=repeated.lineno))
    for loop in loops:
        if loop.test is not None:
            loop.test = nodes.And(call("step", loop), loop.test, lineno=loop.lineno)
    for joined in list(template.find_all(nodes.Concat)):
        joined.nodes = [call("join", joined, nodes.List(joined.nodes, lineno=joined.lineno))]
    template.set_environment(environment)
    return template


def _check_small(arguments: Iterable[object]) -> None:
    if any(isinstance(value, int) and value > N_REPEATED_MAX for value in arguments):
        raise SecurityError("a number is too large")


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        _check_small((*arguments, *options.values()))
        return function(*arguments, **options)

    return checked


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Like Hugging Face's: Jinja's own filter would replace < and > for use in a web page."""
    _check_small((indent,))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
