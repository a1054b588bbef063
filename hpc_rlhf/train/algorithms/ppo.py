"""Proximal policy optimisation on answers of a language model: rewards, advantages, losses.

Tensors of shape (batch, answer) run over the tokens of the answers, padded on the right. Masks are bool,
True on real answer tokens, the end-of-sequence token included, at least one in each row. The state before
token t has value ``values[:, t]``. Whatever stands outside a mask takes no part, not even NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_shaped_rewards(
    log_probs: Tensor, ref_log_probs: Tensor, scores: Tensor, mask: Tensor, kl_coef: float, score_clip: float
) -> Tensor:
    """Per-token rewards (InstructGPT, arXiv 2203.02155, equation 2, with the k1 estimator of the KL).

    ``-kl_coef * (log_probs - ref_log_probs)`` at every answer token, plus the clipped score at exactly
    the last one.

    Args:
        log_probs, ref_log_probs: (batch, answer), of the sampled tokens.
        scores: (batch,), the reward model's.
        mask: (batch, answer).

    Returns:
        (batch, answer), 0 outside the mask.
    """
    rewards = (-kl_coef * (log_probs - ref_log_probs)).where(mask, 0.0)
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores.clamp(-score_clip, score_clip)
    return rewards


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, answers: float) -> float:
    """The KL penalty's weight for the next rollout (arXiv 1909.08593, section 2.2).

    It grows where the KL is above the target and shrinks where it is below, by the relative error, held within
    20 %, for each ``horizon`` answers.

    Args:
        kl: of the rollout, in nats an answer.
        answers: in the rollout, over all ranks.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)


def generalized_advantages(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) on finished episodes.

    Args:
        values, rewards, mask: (batch, answer).

    Returns:
        Advantages and returns (advantage + value), (batch, answer), 0 outside the mask.
    """
    # Zeros behind an answer's end, so that nothing comes from there.
    values, rewards = values.where(mask, 0.0), rewards.where(mask, 0.0)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    carried, backwards = torch.zeros_like(rewards[:, 0]), []
    for delta in reversed(deltas.unbind(dim=1)):
        carried = delta + gamma * lam * carried
        backwards.append(carried)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def policy_loss_sum(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate (arXiv 1707.06347, equation 7), to be minimised.

    Args:
        log_probs, old_log_probs, advantages, mask: (batch, answer).

    Returns:
        The loss, the number of clipped tokens and the probability ratios, each summed over the mask.
    """
    ratio = torch.exp((log_probs - old_log_probs).where(mask, 0.0))
    advantages = advantages.where(mask, 0.0)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped).sum(), (clipped > unclipped).sum(), (ratio * mask).sum()


def value_loss_sum(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Half the larger of the clipped and unclipped squared errors (OpenAI baselines' PPO2).

    Args:
        values, old_values, returns, mask: (batch, answer).

    Returns:
        The loss and the number of clipped tokens, each summed over the mask.
    """
    values, old_values, returns = (x.where(mask, 0.0) for x in (values, old_values, returns))
    held = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (held - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped).sum(), (clipped > unclipped).sum()


def k3_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference): unbiased, never negative, little variance.

    Args:
        log_probs, ref_log_probs, mask: (batch, answer), of tokens sampled from the policy.

    Returns:
        (batch,), summed over each answer, in nats.
    """
    log_ratio = (ref_log_probs - log_probs).where(mask, 0.0)
    return (torch.exp(log_ratio) - 1 - log_ratio).sum(dim=1)
