"""Generalized advantage estimation, compared with sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train.algorithms.advantages import Gae

LENGTHS = (5, 1, 3, 6)
WIDTH = 6
MASK = torch.arange(WIDTH).unsqueeze(0) < torch.tensor(LENGTHS).unsqueeze(1)


def ragged() -> Tensor:
    return torch.randn(len(LENGTHS), WIDTH)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_equal_the_double_sum_on_ragged_lengths(gamma: float, lam: float) -> None:
    values, rewards = ragged(), ragged()
    advantages, returns = Gae(gamma, lam)(rewards, values, MASK)
    for row, length in enumerate(LENGTHS):
        for t in range(WIDTH):
            if t >= length:
                assert advantages[row, t] == 0
                assert returns[row, t] == 0
                continue
            expected = 0.0
            for k in range(t, length):
                following = values[row, k + 1].item() if k + 1 < length else 0.0
                delta = rewards[row, k].item() + gamma * following - values[row, k].item()
                expected += (gamma * lam) ** (k - t) * delta
            assert advantages[row, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), rel=1e-4, abs=1e-5)


def test_with_lambda_one_returns_are_discounted_future_rewards() -> None:
    rewards = ragged()
    _, returns = Gae(gamma=0.9, lam=1.0)(rewards, ragged(), MASK)
    expected = sum(0.9**k * rewards[0, k].item() for k in range(LENGTHS[0]))
    assert returns[0, 0].item() == pytest.approx(expected, rel=1e-4)
