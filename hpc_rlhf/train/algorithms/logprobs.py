"""Log-probabilities of tokens, from logits or, never holding all logits, from hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_rlhf.spec.sizes import ALIGNED, LOGITS

# How a CPU multiplies float32 matrices; torch before 2.9 does not let one choose.
MULTIPLYING: Any = getattr(torch.backends.mkldnn, "matmul", None)


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


def head_log_prob_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
) -> Tensor:
    """The sum of ``head_log_probs``, for less work.

    No token's slope waits for the loss, so the gradients are made along with the sum, while a chunk's logits are there
    (as in Liger Kernel's fused linear cross entropy, arXiv 2410.10989), and only scaled in the backward pass. In
    float16 they would be made without the loss scale that keeps small ones: there the logits are made twice.

    Returns:
        (), float32.
    """
    if weight.dtype == torch.float16:
        return head_log_probs(hidden, weight, bias, tokens, temperature, False)[0].sum()
    made: Tensor = _HeadLogProbSum.apply(hidden, weight, bias, tokens, temperature, torch.is_grad_enabled())
    return made


class _Head:
    """An output head at work on one chunk after another, and the gradients of what it has seen.

    On a CPU, bfloat16 matrices are held as float32 and multiplied as bfloat16: products are summed, and given, in
    float32, with no pass over the logits to convert them.

    Attributes:
        chunk: tokens at a time.
        to_hidden: of each chunk.
        to_weight, to_bias: float32, or None before the first chunk that they are asked of.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        size = LOGITS.get(weight.device.type, LOGITS["cuda"]) // weight.shape[0]
        self.chunk = max(1, size // ALIGNED) * ALIGNED
        self.bfloat16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and bool(MULTIPLYING)
        self.dtype = torch.float32 if self.bfloat16 else weight.dtype
        self.weight, self.bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        self.temperature = temperature
        self.room = self.weight.new_empty(0)
        self.to_hidden: list[Tensor] = []
        self.to_weight: Tensor | None = None
        self.to_bias: Tensor | None = None

    @contextmanager
    def multiplying(self) -> Iterator[None]:
        """Within it, the head's matrices are multiplied in the precision of the weights that it was given."""
        if not self.bfloat16:
            yield
            return
        before, MULTIPLYING.fp32_precision = MULTIPLYING.fp32_precision, "bf16"
        try:
            yield
        finally:
            MULTIPLYING.fp32_precision = before

    def chunks(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Tensors a chunk of rows at a time; the last one is filled up with zeros to a multiple of ALIGNED."""
        for parts in zip(*[tensor.split(self.chunk) for tensor in tensors], strict=True):
            spare = -len(parts[0]) % ALIGNED
            yield [F.pad(part, (*[0, 0] * (part.dim() - 1), 0, spare)) if spare else part for part in parts]

    def logits(self, part: Tensor) -> Tensor:
        """(rows, vocabulary), float32, in memory that the next chunk's take over."""
        if len(self.room) != len(part):
            self.room = self.weight.new_empty(len(part), len(self.weight))
        if self.bias is None:
            torch.mm(part.to(self.dtype), self.weight.T, out=self.room)
        else:
            torch.addmm(self.bias, part.to(self.dtype), self.weight.T, out=self.room)
        logits = self.room.float()
        if self.temperature != 1:
            logits /= self.temperature
        return logits

    def learn(self, slope: Tensor, part: Tensor, needed: tuple[bool, ...]) -> None:
        """Add a chunk's gradients.

        Args:
            slope: (rows, vocabulary), float32: of what is learnt, by the logits.
            part: (rows, hidden).
            needed: whether those of hidden states, weight and bias are.
        """
        low, part = slope.to(self.dtype), part.to(self.dtype)
        if needed[0]:
            self.to_hidden.append(low @ self.weight)
        if needed[1]:
            if self.to_weight is None:
                self.to_weight = (low.T @ part).float()
            elif self.dtype == torch.float32:
                self.to_weight.addmm_(low.T, part)
            else:
                self.to_weight += low.T @ part
        if self.bias is not None and needed[2]:
            own = slope.sum(dim=0)
            self.to_bias = own if self.to_bias is None else self.to_bias + own

    def gradients(self, n: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the n hidden states, weight and bias, where they were asked for."""
        return torch.cat(self.to_hidden)[:n] if self.to_hidden else None, self.to_weight, self.to_bias


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor,
        temperature: float, with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        log_probs, normalizers, entropies = [], [], []
        head = _Head(weight, bias, temperature)
        with head.multiplying():
            for part, chosen in head.chunks(hidden, tokens):
                logits = head.logits(part)
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
        ctx.temperature = temperature
        entropy = torch.cat(entropies)[: len(tokens)] if with_entropies else log_probs[0].new_empty(0)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs)[: len(tokens)], entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        hidden, weight, bias, tokens, normalizers = ctx.saved_tensors
        head = _Head(weight, bias, ctx.temperature)
        slopes = grad / ctx.temperature
        with head.multiplying():
            for part, chosen, normalizer, share in head.chunks(hidden, tokens, normalizers, slopes):
                # d log p(token) / d logits = one-hot(token) - p
                slope = head.logits(part).sub_(normalizer.unsqueeze(1)).exp_().mul_(-share.unsqueeze(1))
                slope.scatter_add_(1, chosen.unsqueeze(1), share.unsqueeze(1))
                head.learn(slope, part, ctx.needs_input_grad)
        given = zip(head.gradients(len(tokens)), (hidden, weight, bias), strict=True)
        return *(None if made is None else made.to(leaf.dtype) for made, leaf in given), None, None, None


class _HeadLogProbSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor,
        temperature: float, learning: bool,
    ) -> Tensor:  # fmt: skip
        head = _Head(weight, bias, temperature)
        whole = torch.zeros((), device=weight.device)
        with head.multiplying():
            for part, chosen, real in head.chunks(
                hidden, tokens, torch.ones_like(tokens, dtype=torch.float32)
            ):
                logits = head.logits(part)
                said, peak = logits.gather(1, chosen.unsqueeze(1)), logits.amax(dim=-1, keepdim=True)
                shares = logits.sub_(peak).exp_()
                total = shares.sum(dim=-1, keepdim=True)
                whole += (said - peak - total.log()).squeeze(1) @ real
                if learning and any(ctx.needs_input_grad):
                    weighed = real.unsqueeze(1) / temperature
                    slope = shares.mul_(-weighed / total).scatter_add_(1, chosen.unsqueeze(1), weighed)
                    head.learn(slope, part, ctx.needs_input_grad)
        ctx.save_for_backward(*head.gradients(len(tokens)))
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (hidden, weight, bias)]
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        given = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if made is None else (made * grad).to(dtype) for made, dtype in given), None, None, None
