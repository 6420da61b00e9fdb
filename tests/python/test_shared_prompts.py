"""What neighbouring prompts have in common is read once, and no answer is another one for that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lminf_edge.evaluation import prompts
from lminf_edge.evaluation.answering import ask_all
from lminf_edge.evaluation.passkey import PasskeySettings, prepare_trials
from lminf_edge.evaluation.prompts import n_shared
from lminf_edge.evaluation.token_source import vocabulary_of
from lminf_edge.middle import MiddleConfig
from test_passkey import settings_for
from tiny_models import TinyModel


@pytest.mark.parametrize(
    "others",
    [
        {"lengths": (1200,)},
        {"lengths": (1200,), "n_trials": 2, "n_needles": 3},
        {"lengths": (1200,), "max_tokens": 160},
    ],
    ids=["trials", "needles", "long answers"],
)
def test_what_is_read_once_changes_no_answer(
    head_32: TinyModel, monkeypatch: pytest.MonkeyPatch, others: dict[str, Any]
) -> None:
    methods = ("endless", "full", "absolute", "shift", "middle")
    settings = settings_for(head_32, methods, **{"max_tokens": 12, "full_tokens": 2000, "truncate": True, **others})
    middle = MiddleConfig(k=4, layers=(0, None))
    settings = replace(settings, setup=replace(settings.setup, middle=middle))
    once, n_kept = answers_of(settings)
    for method in ("endless", "full", "absolute", "middle"):
        assert n_kept[method] >= 256, method
    monkeypatch.setattr(prompts, "_N_SHARED_MIN", 10**9)
    anew, n_kept = answers_of(settings)
    assert not any(n_kept.values())
    assert once == anew
    assert len(set(once.values())) > len(methods)


def answers_of(settings: PasskeySettings) -> tuple[dict[tuple[str, int, int], str], dict[str, int]]:
    """All answers, and of each method the most tokens that were kept for a next prompt."""
    trials = prepare_trials(settings, vocabulary_of(settings.setup.model))
    answers, n_kept = {}, dict.fromkeys((of.method for of in settings.passes()), 0)
    asked = ask_all(settings, trials, lambda of, trial: False, lambda done, total: None, one_line=False)
    for of, trial, answer in asked:
        answers[of.method, trial.trial, trial.needle] = answer.text
        n_kept[of.method] = max(n_kept[of.method], answer.n_kept)
    return answers, n_kept


def test_questions_and_parts_of_micro_batches_are_not_shared() -> None:
    first = np.arange(1000, dtype=np.int32)
    other = np.concatenate([first[:700], -first[:300]])
    assert n_shared(first, other, (50, 50), 32) == 700 // 32 * 32
    assert n_shared(first, other, (300, 300), 32) == 700  # the questions are all that differs
    assert n_shared(first, other, (300, 400), 32) == 600 // 32 * 32
    assert n_shared(first, first, (1, 1), 32) == 999
    assert n_shared(first, other, (800, 800), 32) == 0  # too few
