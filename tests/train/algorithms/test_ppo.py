"""Rewards and losses of PPO compared with closed forms and sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train.algorithms.advantages import Gae
from hpc_rlhf.train.algorithms.ppo import adapted_kl_coef, k3_kl, kl_shaped_rewards, policy_loss_sum, value_loss_sum

LENGTHS = (5, 1, 3, 6)
WIDTH = 6
MASK = torch.arange(WIDTH).unsqueeze(0) < torch.tensor(LENGTHS).unsqueeze(1)


def ragged() -> Tensor:
    return torch.randn(len(LENGTHS), WIDTH)


def with_junk(tensor: Tensor, junk: float) -> Tensor:
    """The tensor with junk outside the mask."""
    return torch.where(MASK, tensor, junk)


def test_rewards_are_the_kl_penalty_and_the_score_at_the_last_token() -> None:
    log_probs, ref_log_probs, scores = ragged(), ragged(), torch.tensor([2.0, -9.0, 7.0, 0.5])
    rewards = kl_shaped_rewards(log_probs, ref_log_probs, scores, MASK, kl_coef=0.1)
    for row, length in enumerate(LENGTHS):
        for t in range(WIDTH):
            expected = 0.0
            if t < length:
                expected = -0.1 * (log_probs[row, t] - ref_log_probs[row, t]).item()
            if t == length - 1:
                expected += scores[row].item()
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kl", "answers", "expected"),
    [
        (6.0, 100, 0.1),  # on the target
        (6.6, 100, 0.1 * (1 + 0.1 * 0.01)),
        (5.4, 100, 0.1 * (1 - 0.1 * 0.01)),
        (60.0, 100, 0.1 * (1 + 0.2 * 0.01)),  # far off: clipped to 20 %
        (0.0, 500, 0.1 * (1 - 0.2 * 0.05)),
    ],
)
def test_the_kl_coefficient_follows_the_clipped_relative_error(kl: float, answers: int, expected: float) -> None:
    assert adapted_kl_coef(0.1, kl, 6.0, 10_000, answers) == pytest.approx(expected, rel=1e-12)


def test_the_kl_coefficient_steers_the_kl_to_the_target() -> None:
    coefficient = 0.01
    for _ in range(2000):
        coefficient = adapted_kl_coef(coefficient, 1 / coefficient, 8.0, 1000, 64)
    assert 1 / coefficient == pytest.approx(8.0, rel=0.01)


def test_equal_policies_have_no_penalty() -> None:
    log_probs = ragged()
    rewards = kl_shaped_rewards(log_probs, log_probs.clone(), torch.zeros(4), MASK, 0.1)
    assert (rewards == 0).all()
    assert (k3_kl(log_probs, log_probs.clone(), MASK) == 0).all()


@pytest.mark.parametrize("junk", [1e30, -1e30, torch.inf, torch.nan])
def test_values_outside_the_mask_change_nothing(junk: float) -> None:
    a, b, c, d = ragged(), ragged(), ragged(), ragged()
    e, f, g, h = (with_junk(tensor, junk) for tensor in (a, b, c, d))
    scores = torch.randn(4)
    clean = [
        kl_shaped_rewards(a, b, scores, MASK, 0.1),
        *Gae(1.0, 0.95)(b, a, MASK),
        *policy_loss_sum(a, b, c, MASK, 0.2),
        *value_loss_sum(a, b, d, MASK, 0.2),
        k3_kl(a, b, MASK),
    ]
    dirty = [
        kl_shaped_rewards(e, f, scores, MASK, 0.1),
        *Gae(1.0, 0.95)(f, e, MASK),
        *policy_loss_sum(e, f, g, MASK, 0.2),
        *value_loss_sum(e, f, h, MASK, 0.2),
        k3_kl(e, f, MASK),
    ]
    for expected, actual in zip(clean, dirty, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("junk", [1e30, torch.nan])
def test_values_outside_the_mask_get_no_gradient(junk: float) -> None:
    for loss in (policy_loss_sum, value_loss_sum):
        inner = with_junk(ragged(), junk).requires_grad_()
        loss(inner, with_junk(ragged(), junk), with_junk(ragged(), junk), MASK, 10.0)[0].backward()
        assert inner.grad is not None
        assert (inner.grad[~MASK] == 0).all()
        assert (inner.grad[MASK] != 0).all()


def test_the_ratio_of_the_first_minibatch_is_exactly_one() -> None:
    log_probs, advantages = ragged() * 20, ragged()
    loss, clipped, ratio = policy_loss_sum(log_probs, log_probs.clone(), advantages, MASK, 0.2)
    assert ratio.item() == MASK.sum().item()
    assert clipped.item() == 0
    torch.testing.assert_close(loss, -advantages[MASK].sum())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -1.2 * 2.0, 1),  # better, and already more likely: clipped at 1 + cliprange
        (1.5, -2.0, 1.5 * 2.0, 0),  # worse, and more likely: pushed back in full
        (0.5, 2.0, -0.5 * 2.0, 0),  # better, and less likely: pushed back in full
        (0.5, -2.0, 0.8 * 2.0, 1),  # worse, and already less likely: clipped at 1 - cliprange
        (1.1, 2.0, -1.1 * 2.0, 0),
        (0.9, -2.0, 0.9 * 2.0, 0),
    ],
)
def test_the_clipped_surrogate_in_its_six_cases(ratio: float, advantage: float, loss: float, clipped: int) -> None:
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    actual, count, ratios = policy_loss_sum(
        log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.tensor([[True]]), 0.2
    )
    assert actual.item() == pytest.approx(loss)
    assert count.item() == clipped
    assert ratios.item() == pytest.approx(ratio)
    actual.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.25, 2.0, -1.25 * 2.0, 0),  # within the upper range
        (1.5, 2.0, -1.28 * 2.0, 1),
        (0.75, -2.0, 0.8 * 2.0, 1),  # the range below 1 stays
    ],
)
def test_the_upper_range_is_another_one(ratio: float, advantage: float, loss: float, clipped: int) -> None:
    log_probs, one = torch.tensor([[math.log(ratio)]]), torch.ones(1, 1)
    actual, count, _ = policy_loss_sum(log_probs, 0 * one, advantage * one, one.bool(), 0.2, 0.28)
    assert actual.item() == pytest.approx(loss)
    assert count.item() == clipped


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (1.0, 1.0, 3.0, 0.5 * 4.0, 0),
        (2.0, 1.0, 3.0, 0.5 * (1.2 - 3.0) ** 2, 1),  # moved towards the return by more than the range
        (2.0, 1.0, 0.0, 0.5 * 4.0, 0),  # moved away from it: the full error counts
        (1.1, 1.0, 3.0, 0.5 * (1.1 - 3.0) ** 2, 0),
        (0.0, 1.0, -1.0, 0.5 * (0.8 + 1.0) ** 2, 1),
    ],
)
def test_the_value_loss_is_half_the_larger_error(
    value: float, old: float, target: float, loss: float, clipped: int
) -> None:
    actual, count = value_loss_sum(
        torch.tensor([[value]]), torch.tensor([[old]]), torch.tensor([[target]]), torch.tensor([[True]]), 0.2
    )
    assert actual.item() == pytest.approx(loss)
    assert count.item() == clipped


def test_k3_is_never_negative_and_its_mean_is_the_kl() -> None:
    policy, reference = torch.randn(7).log_softmax(0), torch.randn(7).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    each = torch.stack(
        [k3_kl(policy[t].view(1, 1), reference[t].view(1, 1), torch.tensor([[True]]))[0] for t in range(7)]
    )
    assert (each >= 0).all()
    assert exact > 0.1
    torch.testing.assert_close((policy.exp() * each).sum(), exact)


def test_k3_adds_up_over_an_answer() -> None:
    log_probs, ref_log_probs = ragged(), ragged()
    actual = k3_kl(log_probs, ref_log_probs, MASK)
    for row, length in enumerate(LENGTHS):
        gaps = (ref_log_probs - log_probs)[row, :length].tolist()
        assert actual[row].item() == pytest.approx(sum(math.exp(gap) - 1 - gap for gap in gaps), rel=1e-4)
