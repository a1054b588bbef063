"""What scores responses to problems of reasoning-gym, in a process without torch: the scorers of its tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

# Bytes that scoring an answer may take.
MEMORY = 2 * 2**30


def make(selected: bool) -> Callable[[list[Any]], float]:
    """The function of a ``Verifier``: the score of an answer, from 0 to 1.

    Args:
        selected: responses are answers that a format has selected. Otherwise the answer is the last text between
            <answer> and </answer>, or all of the response if there is none.
    """
    from reasoning_gym.factory import get_score_answer_fn
    from reasoning_gym.utils import extract_answer

    scorer = cache(get_score_answer_fn)

    def score(item: list[Any]) -> float:
        entry, response = item
        answer = None if selected else extract_answer(response)
        return float(scorer(entry["metadata"]["source_dataset"])(answer or response.strip(), entry))

    return score
