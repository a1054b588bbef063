"""The loss of DPO: its closed form, its gradient, and its optimal policy."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_rlhf.train.algorithms.dpo import preference_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_and_rewards_match_the_paper(smoothing: float) -> None:
    given = [(-10.0, -12.0, -11.0, -11.5), (-7.0, -3.0, -6.0, -5.0), (-400.0, -1.0, -1.0, -1.0)]
    columns = [torch.tensor(column) for column in zip(*given, strict=True)]
    losses, chosen, rejected = preference_loss(*columns, beta=0.1, label_smoothing=smoothing)
    for i, (pi_w, pi_l, ref_w, ref_l) in enumerate(given):
        margin = 0.1 * ((pi_w - ref_w) - (pi_l - ref_l))
        expected = -(1 - smoothing) * math.log(sigmoid(margin)) - smoothing * math.log(1 - sigmoid(margin))
        assert losses[i].item() == pytest.approx(expected, rel=1e-5)
        assert chosen[i].item() == pytest.approx(0.1 * (pi_w - ref_w), rel=1e-5)
        assert rejected[i].item() == pytest.approx(0.1 * (pi_l - ref_l), rel=1e-5, abs=1e-7)


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_half_of_beta() -> None:
    same = torch.tensor([-5.0, -9.0])
    chosen, rejected = same.clone().requires_grad_(), (same - 1).requires_grad_()
    losses, *rewards = preference_loss(chosen, rejected, same, same - 1, beta=0.3, label_smoothing=0.0)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert all(reward.eq(0).all() and not reward.requires_grad for reward in rewards)
    losses.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    # Equation 7's gradient: -beta * sigmoid(rejected reward - chosen reward), and its opposite.
    assert chosen.grad.tolist() == pytest.approx([-0.15, -0.15])
    assert rejected.grad.tolist() == pytest.approx([0.15, 0.15])


def test_the_optimal_policy_is_the_one_that_generated_the_preferences() -> None:
    """Under Bradley-Terry preferences the best policy is ref * exp(r / beta), normalized (equation 4)."""
    beta, reward = 0.5, torch.tensor([0.0, 0.7, -0.4])
    ref = torch.tensor([0.5, 0.2, 0.3]).log()
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    preferred = torch.sigmoid(reward[first] - reward[second])

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        losses, *_ = preference_loss(policy[first], policy[second], ref[first], ref[second], beta, 0.0)
        total = (losses * preferred).sum()
        total.backward()
        return total

    optimizer.step(loss)
    expected = (ref + reward / beta).softmax(0)
    assert logits.softmax(0).tolist() == pytest.approx(expected.tolist(), abs=1e-3)
