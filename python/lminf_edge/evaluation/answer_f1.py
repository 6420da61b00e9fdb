"""How well an answer agrees with those that are right: token F1 as SQuAD defines it.

Sources: Rajpurkar et al., arXiv 1606.05250. Qasper's evaluator scores answers in the same way, by the best F1 over all
reference answers: Dasigi et al., arXiv 2105.03011.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(answer: str) -> list[str]:
    """The words of an answer in lower case, without ASCII punctuation and articles."""
    return _ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split()


def answer_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, 0 to 1; of the reference answer that fits best.

    No word in common is 0, also if there is no word in either: Qasper's evaluator does so, too.

    Args:
        answer: The model's answer.
        references: Answers that are right, at least one.
    """
    return max(_f1(normalised(answer), normalised(reference)) for reference in references)


def is_exact(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer is one of those that are right, apart from case, punctuation and articles."""
    return any(normalised(answer) == normalised(reference) for reference in references)


def _f1(words: list[str], wanted: list[str]) -> float:
    n_common = sum((Counter(words) & Counter(wanted)).values())
    if n_common == 0:
        return 0.0
    precision, recall = n_common / len(words), n_common / len(wanted)
    return 2 * precision * recall / (precision + recall)
