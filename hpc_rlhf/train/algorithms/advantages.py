"""The extension point for advantages, and generalized advantage estimation (GAE).

Tensors of shape (batch, response) run over response tokens, padded on the right. Masks are bool, True on real
response tokens, at least one per row. Nothing outside a mask takes part, not even NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AdvantageEstimator(Protocol):
    """Turns rewards into advantages; a pure function of tensors."""

    def __call__(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages of the tokens, and returns for the critic to learn.

        Args:
            rewards: (batch, response), per token.
            values: (batch, response), the critic's value of the state before each token.
            mask: (batch, response), bool; True on real response tokens.

        Returns:
            (batch, response) each, 0 outside the mask.
        """


@dataclass(frozen=True)
class Gae:
    """Generalized advantage estimation (arXiv 1506.02438, equation 16) on finished episodes.

    Attributes:
        gamma: discount.
        lam: lambda, 0 for one-step temporal differences, 1 for whole returns.
    """

    gamma: float
    lam: float

    def __call__(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages, and returns (advantage + value)."""
        # Zeros after the end of a response, so that nothing flows back from there.
        values, rewards = values.where(mask, 0.0), rewards.where(mask, 0.0)
        deltas = rewards + self.gamma * F.pad(values[:, 1:], (0, 1)) - values
        carried, backwards = torch.zeros_like(rewards[:, 0]), []
        for delta in reversed(deltas.unbind(dim=1)):
            carried = delta + self.gamma * self.lam * carried
            backwards.append(carried)
        advantages = torch.stack(backwards[::-1], dim=1)
        return advantages, advantages + values
