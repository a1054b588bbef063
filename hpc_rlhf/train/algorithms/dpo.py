"""The loss of direct preference optimisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss of DPO (arXiv 2305.18290, equation 7), for labels that may be wrong.

    An answer's implicit reward is ``beta * (log p(answer) - log ref(answer))``. A pair's loss is
    ``-logsigmoid(chosen reward - rejected reward)``. With label smoothing e it is what this would be on average if a
    share e of the labels were the wrong way round: ``(1 - e)`` of that loss and ``e`` of the other order's.

    Args:
        chosen, rejected: (pairs,), float32; log-probabilities of whole answers, in nats.
        ref_chosen, ref_rejected: (pairs,), float32; the reference's.
        beta: how much a departure from the reference must be worth.
        label_smoothing: 0 <= e < 0.5.

    Returns:
        Losses, and implicit rewards of the chosen and of the rejected: (pairs,) each; the rewards without gradient.
    """
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen_reward.detach(), rejected_reward.detach()
