"""The loss of Kahneman-Tversky optimization."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    log_ratios: Tensor, desirable: Tensor, kl: float, beta: float, desirable_weight: float, undesirable_weight: float
) -> tuple[Tensor, Tensor]:
    """The loss of KTO (arXiv 2402.01306, equation 8).

    A response's implicit reward is ``beta * log_ratio``, and the reference point ``beta * kl``. The loss is the weight
    of the response's kind times one minus its value: the sigmoid of the distance from the reference point, taken
    upwards for good responses and downwards for bad ones.

    Args:
        log_ratios: (responses,), float32; log p(response) - log ref(response), in nats.
        desirable: (responses,), bool; True for good responses.
        kl: estimate of the divergence of the policy from the reference, in nats, at least 0; see ``reference_point``.
        beta: strength of the penalty for moving away from the reference.
        desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U.

    Returns:
        Losses, and by how much each reward is on the right side of the reference point, without gradient:
            (responses,) each.
    """
    sides = torch.where(desirable, 1.0, -1.0)
    margins = sides * beta * (log_ratios - kl)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * torch.sigmoid(-margins), margins.detach()


def reference_point(mismatched: float, count: float) -> float:
    """The estimate of KL(policy || reference) that is KTO's reference point (arXiv 2402.01306, section 4.1).

    It is biased, but needs no sampling: the mean over responses to other prompts, and at least 0.

    Args:
        mismatched: sum of log p(response) - log ref(response), in nats, each after a prompt of another response.
        count: the number of these responses.
    """
    return max(0.0, mismatched / count)
