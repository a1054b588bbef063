"""Scores responses to problems from reasoning-gym by the scorers of its tasks, in a process without torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

# Memory for scoring an answer, in bytes.
MEMORY = 2 * 2**30


def make(selected: bool) -> Callable[[list[Any]], float]:
    """Make the function of a ``Verifier``, which scores an answer from 0 to 1.

    Args:
        selected: a format has selected the answer from each response. Otherwise it is the last text between <answer>
            and </answer>, or all of the response if there is none.
    """
    from reasoning_gym.factory import get_score_answer_fn
    from reasoning_gym.utils import extract_answer

    scorer = cache(get_score_answer_fn)

    def score(item: list[Any]) -> float:
        entry, response = item
        answer = None if selected else extract_answer(response)
        return float(scorer(entry["metadata"]["source_dataset"])(answer or response.strip(), entry))

    return score
