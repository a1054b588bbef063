"""Accuracy of several responses to a prompt: pass@k and majority@k, for one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that at least one of k responses is correct, without bias (arXiv 2107.03374, equation 1).

    Args:
        samples: responses to the prompt, at least k.
        correct: how many of them are correct.
    """
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def majority_at_k(answers: Sequence[Hashable], correct: Sequence[bool], k: int) -> float:
    """The probability that the most frequent answer of k responses is correct (self-consistency, arXiv 2203.11171).

    The mean over all subsets of k responses; of several most frequent answers, each counts with the same weight.

    Args:
        answers: the final answer of each response; None where it has none, which is never an answer to agree on.
        correct: of each response; the same for equal answers.
    """
    right = {answer for answer, good in zip(answers, correct, strict=True) if good and answer is not None}
    counts = list(Counter(answer for answer in answers if answer is not None).items())
    missing = len(answers) - sum(count for _, count in counts)
    return sum(_wins(counts, place, missing, k) for place, (answer, _) in enumerate(counts) if answer in right)


def _wins(counts: list[tuple[Hashable, int]], place: int, missing: int, k: int) -> float:
    """The probability that an answer is the most frequent of k drawn; a tie of n counts 1 / n.

    Args:
        counts: of each answer.
        place: of the answer in ``counts``.
        missing: responses without an answer.
    """
    total = 0.0
    for votes in range(1, min(counts[place][1], k) + 1):
        # Subsets of the other responses in which no answer has more votes.
        ways = {(0, 0): 1}  # (responses drawn, answers in the tie) -> subsets
        for other, (_, count) in enumerate(counts):
            if other == place:
                continue
            grown: dict[tuple[int, int], int] = {}
            for (drawn, tied), subsets in ways.items():
                for taken in range(min(count, votes, k - votes - drawn) + 1):
                    key = drawn + taken, tied + (taken == votes)
                    grown[key] = grown.get(key, 0) + subsets * comb(count, taken)
            ways = grown
        mine = comb(counts[place][1], votes)
        total += sum(
            mine * subsets * comb(missing, k - votes - drawn) / (1 + tied) for (drawn, tied), subsets in ways.items()
        )
    return total / comb(sum(count for _, count in counts) + missing, k)
