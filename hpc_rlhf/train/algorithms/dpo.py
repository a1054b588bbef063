"""The loss of direct preference optimization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of DPO (arXiv 2305.18290, equation 7), with label smoothing.

    A response's implicit reward is ``beta * (log p(response) - log ref(response))``. A pair's loss is
    ``-logsigmoid(chosen reward - rejected reward)``. Label smoothing e gives the expected loss if a fraction
    e of the labels is flipped: ``(1 - e)`` times that loss plus ``e`` times the flipped pair's.

    Args:
        chosen, rejected: (pairs,), float32; log-probabilities of whole responses, in nats.
        ref_chosen, ref_rejected: (pairs,), float32; the reference's.
        beta: strength of the penalty for moving away from the reference.
        label_smoothing: 0 <= e < 0.5.

    Returns:
        Losses, and implicit rewards of the chosen and the rejected: (pairs,) each; the rewards without
            gradient.
    """
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen_reward.detach(), rejected_reward.detach()
