"""What a chat template writes for each turn, so that a conversation can be read turn by turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lminf_edge import ChatSession, ConfigError, UnsupportedModelError
from lminf_edge._library import _core
from lminf_edge.chat_prompt import ChatFormat
from lminf_edge.chat_template import JinjaTemplate
from lminf_edge.chat_turns import TurnFormat
from tiny_models import TinyModel, write_tiny_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FOLDED = (  # as Gemma's: the system prompt stands in the first question
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<|im_start|>{{ m.role }}\n{{ first if loop.first else '' }}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
THINKING = (  # as Qwen 3's: the last answer looks different from earlier ones
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MOVING = (  # as some of Mistral's: the system prompt stands in the last question
    "{% for m in messages if m.role != 'system' %}"
    "[{{ messages[0].content if loop.last and messages[0].role == 'system' "
    "else '' }}{{ m.content }}]{% endfor %}"
)


def turn_format(model: TinyModel, template: str, system: str | None, monkeypatch: pytest.MonkeyPatch) -> TurnFormat:
    core = _core.Model(str(model.path), vocab_only=True)
    chat_format = ChatFormat(core)
    monkeypatch.setattr(chat_format, "_template", JinjaTemplate(template, bos_token="", eos_token="<|im_end|>"))
    return TurnFormat(chat_format, system)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", [CHATML, FOLDED, THINKING], ids=["chatml", "folded", "thinking"])
def test_turns_are_what_the_template_writes(
    head_32: TinyModel, template: str, system: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = turn_format(head_32, template, system, monkeypatch)
    chat_format = turns._format
    opening = [] if system is None else [{"role": "system", "content": system}]
    first, second = "Hello <|im_end|> there", "Größe?"
    answer = chat_format.tokenize("Yes.")
    question = turns.question(first)
    beginning = [*opening, {"role": "user", "content": first}]
    assert turns.pinned + question[turns.n_header :] + turns.prompt == chat_format.tokens(beginning)
    conversation = [*beginning, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": second}]
    spoken = turns.pinned + question[turns.n_header :] + turns.prompt + answer + turns.closing
    assert detokenized(chat_format, spoken + turns.question(second) + turns.prompt).replace(
        "<|im_start|>model\n", "<|im_start|>assistant\n"
    ) == detokenized(chat_format, chat_format.tokens(conversation)).replace(
        "<|im_start|>model\n", "<|im_start|>assistant\n"
    )
    assert turns.pinned  # something is


def detokenized(chat_format: ChatFormat, tokens: list[int]) -> str:
    return chat_format._model.detokenize(np.array(tokens, np.int32), False, True).decode()


def test_a_template_that_moves_the_system_prompt_is_refused(
    head_32: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="writes messages differently"):
        turn_format(head_32, MOVING, "Be brief.", monkeypatch)


def test_a_model_without_a_template_is_refused(
    head_32: TinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tiny_models._CHAT_TEMPLATE", "{% if %}")
    broken = write_tiny_model(tmp_path / "broken.gguf", head_32.shape, seed=1)
    with pytest.raises(UnsupportedModelError, match="template"):
        ChatSession.open(broken.path)
    with ChatSession.open(broken.path, chat_format="chatml", n_window=64) as session:
        session.send("Hello!", stream=False, max_tokens=2)
