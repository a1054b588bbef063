"""pass@k and majority@k compared with the mean over all subsets."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest

from hpc_rlhf.train.algorithms.accuracy import majority_at_k, pass_at_k


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(samples: int, correct: int) -> None:
    good = [place < correct for place in range(samples)]
    for k in range(1, samples + 1):
        subsets = [any(subset) for subset in itertools.combinations(good, k)]
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def majority(answers: list[str | None], right: str, k: int) -> float:
    """The mean over all subsets of the share of ``right`` among the most frequent answers."""
    total, subsets = Fraction(0), 0
    for subset in itertools.combinations(answers, k):
        votes = Counter(answer for answer in subset if answer is not None)
        top = [answer for answer, count in votes.items() if count == max(votes.values())]
        total += Fraction(right in top, max(1, len(top)))
        subsets += 1
    return float(total / subsets)


@pytest.mark.parametrize(
    "answers",
    [
        ["4"],
        ["5"],
        [None, None, None],
        ["4", "4", "5", "5", "6"],
        ["4", None, "5", "4", None, "5", "5", "7"],
        ["5", "5", "5", "4"],
        ["4", "5", "6", "7", "8", None],
    ],
)
def test_majority_at_k_is_the_mean_over_subsets(answers: list[str | None]) -> None:
    correct = [answer == "4" for answer in answers]
    for k in range(1, len(answers) + 1):
        assert majority_at_k(answers, correct, k) == pytest.approx(majority(answers, "4", k), abs=1e-12)
