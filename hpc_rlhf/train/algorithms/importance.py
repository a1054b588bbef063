"""Truncated importance sampling: a correction for responses that another engine drew than the one that learns.

Both have the same weights, but compute probabilities in another order or precision (Yao et al. 2025, "Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training"; Espeholt et al., arXiv 1802.01561, for the truncation).
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_weights(log_probs: Tensor, sampler: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The factor of each token's loss, and whether it was truncated.

    Args:
        log_probs: of the drawn tokens under the actor in training, before it learned from them; any shape.
        sampler: those by which they were drawn.
    """
    ratio = torch.exp(log_probs - sampler)
    return ratio.clamp(max=cap), ratio > cap


def mismatch_kl(log_probs: Tensor, sampler: Tensor) -> Tensor:
    """The k3 estimate of KL(sampler || actor) at each drawn token, in nats; never negative."""
    difference = log_probs - sampler
    return torch.expm1(difference) - difference
