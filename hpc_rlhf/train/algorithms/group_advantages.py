"""Advantages without a critic: each response is compared with the other responses to its prompt, or with the batch.

Scores have shape (batch,), float32, NaN where a response has none; it then takes no part, and its advantage is 0.
Groups have shape (batch,), int64: responses to the same prompt have the same number. Groups may differ in size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpc_rlhf.train.algorithms.moments import Moments

# Keeps the advantages of nearly equal scores finite.
EPSILON = 1e-4


def grpo(scores: Tensor, groups: Tensor) -> Tensor:
    """The score's distance from its group's mean, in sample standard deviations (GRPO, arXiv 2402.03300).

    Exactly 0 in a group of equal scores, and in a group with one score.

    Returns:
        (batch,).
    """
    return _by_group(scores, groups, lambda own: (own - own.mean()) / (own.std() + EPSILON))


def dr_grpo(scores: Tensor, groups: Tensor) -> Tensor:
    """The score's distance from its group's mean (Dr. GRPO, arXiv 2503.20783).

    Without the division by the standard deviation, which prefers prompts that are nearly always or never solved.

    Returns:
        (batch,).
    """
    return _by_group(scores, groups, lambda own: own - own.mean())


def rloo(scores: Tensor, groups: Tensor) -> Tensor:
    """The score minus the mean of the others in its group (RLOO, arXiv 2402.14740), an unbiased baseline.

    Returns:
        (batch,).
    """
    return _by_group(scores, groups, lambda own: (own - own.mean()) * (len(own) / (len(own) - 1)))


def _by_group(scores: Tensor, groups: Tensor, advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """The advantages of each group's scores; 0 where there is nothing to compare a score with, or no difference."""
    result = torch.zeros_like(scores)
    for group in groups.unique():
        members = (groups == group) & ~scores.isnan()
        own = scores[members]
        # Equal scores: their mean may differ from them by rounding, which a division would blow up.
        if len(own) > 1 and own.min() < own.max():
            result[members] = advantages(own)
    return result


def varied(scores: Tensor, groups: Tensor) -> Tensor:
    """Whether a group has different scores; one without has no gradient: (groups,), bool, in order of their numbers."""
    spread = [scores[(groups == group) & ~scores.isnan()] for group in groups.unique()]
    return torch.tensor([len(own) > 1 and bool(own.min() < own.max()) for own in spread], dtype=torch.bool)


def returns_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """The sum of the rewards from each token on: the return of REINFORCE++ (arXiv 2501.03262).

    Args:
        rewards: (batch, response), per token, with the score at the last one.
        mask: (batch, response), bool; True on real response tokens.

    Returns:
        (batch, response), 0 outside the mask.
    """
    rewards = rewards.where(mask, 0.0)
    return rewards.flip(1).cumsum(1).flip(1) * mask


def batch_normalized(advantages: Tensor, mask: Tensor, gather: Callable[[Moments], list[Moments]]) -> Tensor:
    """Advantages at mean 0 and variance 1 over the tokens of all ranks (REINFORCE++, arXiv 2501.03262).

    Args:
        advantages: (batch, response).
        mask: (batch, response), bool; True on the tokens that take part.
        gather: gathers the moments of each rank's tokens. Collective.

    Returns:
        (batch, response), 0 outside the mask.
    """
    moments = Moments.merge(gather(Moments.of(advantages[mask])))
    return (moments.standardize(advantages) * mask).where(mask, 0.0)


def overlong_penalty(lengths: Tensor, longest: int, margin: int) -> Tensor:
    """The soft penalty of long responses (DAPO, arXiv 2503.14476, equation 13): from 0 down to -1 over the margin.

    Args:
        lengths: (batch,), tokens of each response.
        longest: maximum tokens of a response.
        margin: tokens before the maximum over which the penalty grows, at least 1.

    Returns:
        (batch,), float32.
    """
    return -((lengths - (longest - margin)) / margin).clamp(0.0, 1.0)
