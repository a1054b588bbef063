"""Proximal policy optimization of a language model: per-token rewards and losses.

Tensors of shape (batch, response) run over response tokens, padded on the right. Masks are bool, True on real
response tokens including EOS, at least one per row. The state before token t has value ``values[:, t]``.
Values outside a mask are ignored, even NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_shaped_rewards(log_probs: Tensor, ref_log_probs: Tensor, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards (InstructGPT, arXiv 2203.02155, equation 2, with the k1 estimator of the KL).

    ``-kl_coef * (log_probs - ref_log_probs)`` at every response token, plus the score at the last one.

    Args:
        log_probs, ref_log_probs: (batch, response), of the sampled tokens.
        scores: (batch,), of whole responses, clipped and penalized.
        mask: (batch, response).

    Returns:
        (batch, response), 0 outside the mask.
    """
    rewards = (-kl_coef * (log_probs - ref_log_probs)).where(mask, 0.0)
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, responses: float) -> float:
    """The KL penalty's weight for the next rollout (arXiv 1909.08593, section 2.2).

    It grows if the KL is above the target and shrinks if it is below, by the relative error, clipped to 20 %,
    per ``horizon`` responses.

    Args:
        kl: of the rollout, in nats per response.
        responses: in the rollout, over all ranks.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)


def policy_loss_sum(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float,
    cliprange_high: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The clipped surrogate loss (arXiv 1707.06347, equation 7).

    ``max(-A * r, -A * clip(r, 1 - cliprange, 1 + cliprange_high))`` with ``r = exp(log_probs - old_log_probs)``.

    Args:
        log_probs, old_log_probs, advantages, mask: (batch, response).
        cliprange_high: another range above 1 (DAPO, arXiv 2503.14476, equation 10); ``cliprange`` if None.

    Returns:
        The summed loss, the number of clipped tokens and the sum of the ratios, over the mask.
    """
    ratio = torch.exp((log_probs - old_log_probs).where(mask, 0.0))
    advantages = advantages.where(mask, 0.0)
    unclipped = -advantages * ratio
    high = cliprange if cliprange_high is None else cliprange_high
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + high)
    return torch.maximum(unclipped, clipped).sum(), (clipped > unclipped).sum(), (ratio * mask).sum()


def value_loss_sum(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Half the larger of the clipped and unclipped squared errors (OpenAI baselines' PPO2).

    Args:
        values, old_values, returns, mask: (batch, response).

    Returns:
        The summed loss and the number of clipped tokens, over the mask.
    """
    values, old_values, returns = (x.where(mask, 0.0) for x in (values, old_values, returns))
    clipped_values = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped).sum(), (clipped > unclipped).sum()


def k3_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Schulman's k3 estimator of KL(policy || reference): unbiased, never negative, low variance.

    Args:
        log_probs, ref_log_probs, mask: (batch, response), of tokens sampled from the policy.

    Returns:
        (batch,), summed over each response, in nats.
    """
    log_ratio = (ref_log_probs - log_probs).where(mask, 0.0)
    return (torch.exp(log_ratio) - 1 - log_ratio).sum(dim=1)
