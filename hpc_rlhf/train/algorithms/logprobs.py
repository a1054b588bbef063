"""Log-probabilities of tokens, from logits or, never holding all logits, from hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Float32 logits held at a time: 64 MiB keep a GPU busy; 4 MiB stay in a CPU's cache.
LOGITS = {"cuda": 16 * 2**20, "cpu": 2**20}
# Rows of a chunk are a multiple of so many: matrix kernels are made anew, and kept, for every other height.
ALIGNED = 64


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, in float32.

    Args:
        logits: (…, vocabulary), each row predicting the token of the same place.
        tokens: (…), int64.
        temperature: what the logits are divided by, as in sampling.

    Returns:
        (…), float32.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(scaled, dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each next-token distribution, in nats.

    Args:
        logits: (…, vocabulary).

    Returns:
        (…), float32.
    """
    scaled = logits.float() / temperature
    log_probs = scaled - torch.logsumexp(scaled, dim=-1, keepdim=True)
    return -(log_probs.exp() * log_probs).sum(-1)


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    with_entropies: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens from the hidden states that predict them, a chunk of the logits at a time.

    The backward pass makes the logits again. What stands in float32 is at most LOGITS numbers, or the logits of
    ALIGNED tokens, whatever the number of tokens.

    Args:
        hidden: (n, hidden).
        weight, bias: the output head's, (vocabulary, hidden) and (vocabulary,).
        tokens: (n,), int64.
        temperature: what the logits are divided by.

    Returns:
        Log-probabilities (n,), float32, and the distributions' entropies (n,), float32, in nats and without a
        gradient; (0,) where they are not asked for.
    """
    made: tuple[Tensor, Tensor] = _HeadLogProbs.apply(
        hidden, weight, bias, tokens, temperature, with_entropies
    )
    return made


def _chunks(rows: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Tensors a chunk of rows at a time; the last one is filled up with zeros to a multiple of ALIGNED."""
    for parts in zip(*[tensor.split(rows) for tensor in tensors], strict=True):
        spare = -len(parts[0]) % ALIGNED
        yield [F.pad(part, (*[0, 0] * (part.dim() - 1), 0, spare)) if spare else part for part in parts]


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor,
        temperature: float, with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        chunk = max(1, LOGITS.get(weight.device.type, LOGITS["cuda"]) // weight.shape[0] // ALIGNED) * ALIGNED
        log_probs, normalizers, entropies = [], [], []
        for part, chosen in _chunks(chunk, hidden, tokens):
            logits = F.linear(part, weight, bias).float()
            if temperature != 1:
                logits /= temperature
            # Passes over the logits are what takes time: few, and in place.
            said, peak = logits.gather(1, chosen.unsqueeze(1)), logits.amax(dim=-1, keepdim=True)
            logits -= peak
            shares = logits.exp() if with_entropies else logits.exp_()
            total = shares.sum(dim=-1)
            normalizer = peak.squeeze(1) + total.log()
            normalizers.append(normalizer)
            log_probs.append(said.squeeze(1) - normalizer)
            if with_entropies:
                entropies.append(total.log() - torch.linalg.vecdot(shares, logits) / total)
        ctx.save_for_backward(hidden, weight, bias, tokens, torch.cat(normalizers)[: len(tokens)])
        ctx.temperature, ctx.chunk = temperature, chunk
        entropy = torch.cat(entropies)[: len(tokens)] if with_entropies else log_probs[0].new_empty(0)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs)[: len(tokens)], entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        hidden, weight, bias, tokens, normalizers = ctx.saved_tensors
        to_weight = to_bias = wide = None
        to_hidden = []
        slopes = grad / ctx.temperature
        for part, chosen, normalizer, share in _chunks(ctx.chunk, hidden, tokens, normalizers, slopes):
            logits = F.linear(part, weight, bias).float()
            if ctx.temperature != 1:
                logits /= ctx.temperature
            # d log p(token) / d logits = one-hot(token) - p
            slope = logits.sub_(normalizer.unsqueeze(1)).exp_().mul_(-share.unsqueeze(1))
            slope.scatter_add_(1, chosen.unsqueeze(1), share.unsqueeze(1))
            low = slope.to(weight.dtype)
            if ctx.needs_input_grad[0]:
                to_hidden.append(low @ weight)
            if ctx.needs_input_grad[1]:
                if to_weight is None:
                    to_weight = (low.T @ part).float()
                else:
                    wide = torch.empty_like(to_weight) if wide is None else wide
                    to_weight += wide.copy_(low.T @ part)
            if bias is not None and ctx.needs_input_grad[2]:
                own = slope.sum(dim=0)
                to_bias = own if to_bias is None else to_bias + own
        return (
            torch.cat(to_hidden)[: len(tokens)] if to_hidden else None,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(weight.dtype),
            None, None, None,
        )  # fmt: skip
