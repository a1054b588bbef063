"""Advantages within groups and batches, compared with sums written out and with the exact gradient of a bandit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train.algorithms.group_advantages import (
    EPSILON,
    batch_normalized,
    dr_grpo,
    grpo,
    overlong_penalty,
    returns_to_go,
    rloo,
)
from hpc_rlhf.train.algorithms.moments import Moments

NAN = math.nan
# Groups of different sizes, interleaved: one with a skipped response, one with a single score left, one without any.
SCORES = [1.0, 0.5, -2.0, NAN, 3.0, 0.25, NAN, 4.0, NAN, 0.1, 0.1, 0.1]
GROUPS = [7, 2, 7, 7, 2, 7, 5, 5, 9, 4, 4, 4]


def brute_force(one: Callable[[float, list[float]], float]) -> list[float]:
    """The advantage of each score by a formula of it and the others in its group."""
    result = []
    for place, (score, group) in enumerate(zip(SCORES, GROUPS, strict=True)):
        others = [
            other
            for at, (other, its) in enumerate(zip(SCORES, GROUPS, strict=True))
            if its == group and at != place and not math.isnan(other)
        ]
        result.append(0.0 if math.isnan(score) or not others else one(score, others))
    return result


def in_deviations(score: float, others: list[float]) -> float:
    every = [score, *others]
    return (score - fmean(every)) / (stdev(every) + EPSILON)


FORMULAS = {
    grpo: in_deviations,
    dr_grpo: lambda score, others: score - fmean([score, *others]),
    rloo: lambda score, others: score - fmean(others),
}


@pytest.mark.parametrize("estimate", FORMULAS)
def test_advantages_are_those_of_the_formula(estimate: Callable[[Tensor, Tensor], Tensor]) -> None:
    advantages = estimate(torch.tensor(SCORES), torch.tensor(GROUPS))
    assert advantages.tolist() == pytest.approx(brute_force(FORMULAS[estimate]), abs=1e-6)


@pytest.mark.parametrize("estimate", FORMULAS)
@pytest.mark.parametrize("score", [0.1, 1 / 3, -7e5])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_group_without_differences_gives_no_gradient(
    estimate: Callable[[Tensor, Tensor], Tensor], score: float, size: int
) -> None:
    advantages = estimate(torch.full((size,), score), torch.zeros(size, dtype=torch.int64))
    assert (advantages == 0).all()


@pytest.mark.parametrize("estimate", FORMULAS)
def test_a_group_does_not_depend_on_the_others(estimate: Callable[[Tensor, Tensor], Tensor]) -> None:
    scores, groups = torch.tensor(SCORES), torch.tensor(GROUPS)
    alone = torch.zeros_like(scores)
    for group in groups.unique():
        alone[groups == group] = estimate(scores[groups == group], groups[groups == group])
    assert torch.equal(estimate(scores, groups), alone)


@pytest.mark.parametrize(("estimate", "share"), [(rloo, 1.0), (dr_grpo, 3 / 4)])
def test_the_expected_gradient_is_that_of_the_bandit(
    estimate: Callable[[Tensor, Tensor], Tensor], share: float
) -> None:
    """Over all groups of four draws from three arms: RLOO's is exact; Dr. GRPO's is shorter, as its baseline holds the
    response itself."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    (exact,) = torch.autograd.grad(logits.softmax(0) @ rewards, logits)
    expected = torch.zeros_like(exact)
    for arms in itertools.product(range(3), repeat=4):
        log_probs = logits.log_softmax(0)[list(arms)]
        advantages = estimate(rewards[list(arms)], torch.zeros(4, dtype=torch.int64))
        (gradient,) = torch.autograd.grad((log_probs * advantages).mean(), logits)
        expected += log_probs.detach().sum().exp() * gradient
    assert torch.allclose(expected, share * exact, atol=1e-12)


def test_returns_sum_the_rewards_from_each_token_on() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, NAN], [5.0, NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert returns_to_go(rewards, mask).tolist() == [[6.0, 5.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_normalization_is_over_the_tokens_of_all_ranks(ranks: int) -> None:
    advantages, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.6
    advantages[~mask] = NAN
    parts = list(zip(advantages.chunk(ranks), mask.chunk(ranks), strict=True))
    everyone = [Moments.of(own[real]) for own, real in parts]
    whole = torch.cat([batch_normalized(own, real, lambda _: everyone) for own, real in parts])
    real = advantages[mask].double()
    expected = (real - real.mean()) / real.std(correction=0)
    assert torch.allclose(whole[mask].double(), expected, atol=1e-6)
    assert (whole[~mask] == 0).all()


def test_the_overlong_penalty_grows_over_the_margin() -> None:
    penalty = overlong_penalty(torch.tensor([1, 80, 85, 90, 100]), longest=100, margin=20)
    assert penalty.tolist() == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0])
