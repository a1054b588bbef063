"""Token log-probabilities and next-token loss."""

from __future__ import annotations

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, in float32.

    Args:
        logits: (batch, length, vocabulary); ``logits[:, t]`` predicts ``tokens[:, t]``.
        tokens: (batch, length), int64.
        temperature: what the logits are divided by, as in sampling.

    Returns:
        (batch, length), float32.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(scaled, dim=-1)


def next_token_loss_sum(logits: Tensor, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Summed negative log-probability of the tokens to be learnt.

    Args:
        logits: (batch, length, vocabulary), from ``input_ids``.
        input_ids: (batch, length), int64.
        loss_mask: (batch, length), bool; True where the token at that position is to be predicted
            from those before it. Position 0 is never predicted.

    Returns:
        A scalar, to be divided by the number of tokens learnt over all ranks.
    """
    log_probs = token_log_probs(logits[:, :-1], input_ids[:, 1:])
    return -log_probs.where(loss_mask[:, 1:], 0.0).sum()


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each next-token distribution, in nats.

    Args:
        logits: (batch, length, vocabulary).

    Returns:
        (batch, length), float32.
    """
    scaled = logits.float() / temperature
    log_probs = scaled - torch.logsumexp(scaled, dim=-1, keepdim=True)
    return -(log_probs.exp() * log_probs).sum(-1)
