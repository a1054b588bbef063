"""Log-probabilities of tokens, from logits, or from hidden states without holding all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hpc_rlhf.spec.sizes import ALIGNED, head_rows

# The precision in which a CPU multiplies float32 matrices; torch before 2.9 has no such setting.
MATMUL: Any = getattr(torch.backends.mkldnn, "matmul", None)


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, in float32.

    Args:
        logits: (…, vocabulary), each row predicting the token at the same index.
        tokens: (…), int64.
        temperature: divides the logits, as in sampling.

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
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, with_entropies: bool,
    group: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities of tokens from the hidden states that predict them, one chunk of logits at a time.

    The backward pass computes the logits again. Those of ``head_rows`` tokens exist at a time, whatever the number of
    tokens.

    Args:
        hidden: (n, hidden).
        weight, bias: the output head's, (vocabulary, hidden) and (vocabulary,).
        tokens: (n,), int64.
        temperature: divides the logits.
        group: the process group over whose ranks the vocabulary is split, if it is: the weight and the bias are this
            rank's equal share of them, in order. All ranks pass the same hidden states and tokens, and get the same.
            The logits of a token are never together on one rank (arXiv 1909.08053, section 3).

    Returns:
        Log-probabilities (n,), float32, and the distributions' entropies (n,), float32, in nats and without a
        gradient; (0,) if not requested.
    """
    outputs: tuple[Tensor, Tensor] = _HeadLogProbs.apply(
        hidden, weight, bias, tokens, temperature, with_entropies, group
    )
    return outputs


def head_log_prob_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, group: Any = None
) -> Tensor:
    """The sum of ``head_log_probs``, with less work.

    Gradients do not depend on the loss, so they are computed along with the sum, while a chunk's logits exist (as in
    Liger Kernel's fused linear cross entropy, arXiv 2410.10989), and the backward pass only scales them. In float16
    they would lack the loss scale that protects small gradients: there the logits are computed twice.

    Returns:
        (), float32.
    """
    if weight.dtype == torch.float16:
        return head_log_probs(hidden, weight, bias, tokens, temperature, False, group)[0].sum()
    total: Tensor = _HeadLogProbSum.apply(hidden, weight, bias, tokens, temperature, torch.is_grad_enabled(), group)
    return total


class _Head:
    """An output head applied chunk by chunk, and the gradients accumulated so far.

    On a CPU, bfloat16 matrices are stored as float32 and multiplied as bfloat16: logits and the weight's gradient are
    summed and returned in float32, without a pass to convert them.

    Attributes:
        chunk: tokens at a time.
        narrow: the weight in its own precision.
        hidden_grads: gradients of the hidden states of each chunk.
        weight_grad, bias_grad: float32; None before the first chunk, or if not needed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, group: Any) -> None:
        self.group = group
        self.first = 0 if group is None else dist.get_rank(group) * len(weight)  # token of the weight's first row
        self.chunk = head_rows(weight.device.type, len(weight))
        self.bfloat16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and bool(MATMUL)
        self.dtype = torch.float32 if self.bfloat16 else weight.dtype
        self.narrow = weight
        self.weight, self.bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        self.temperature = temperature
        self.buffer = self.weight.new_empty(0)
        self.hidden_grads: list[Tensor] = []
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None

    @contextmanager
    def multiplying(self) -> Iterator[None]:
        """Within it, the head's matrices are multiplied in the precision of its original weights."""
        if not self.bfloat16:
            yield
            return
        before, MATMUL.fp32_precision = MATMUL.fp32_precision, "bf16"
        try:
            yield
        finally:
            MATMUL.fp32_precision = before

    def chunks(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Tensors one chunk of rows at a time; the last is padded with zeros to a multiple of ALIGNED."""
        for parts in zip(*[tensor.split(self.chunk) for tensor in tensors], strict=True):
            spare = -len(parts[0]) % ALIGNED
            yield [F.pad(part, (*[0, 0] * (part.dim() - 1), 0, spare)) if spare else part for part in parts]

    def logits(self, part: Tensor) -> Tensor:
        """(rows, vocabulary), float32, in memory that the next chunk reuses."""
        if len(self.buffer) != len(part):
            self.buffer = self.weight.new_empty(len(part), len(self.weight))
        if self.bias is None:
            torch.mm(part.to(self.dtype), self.weight.T, out=self.buffer)
        else:
            torch.addmm(self.bias, part.to(self.dtype), self.weight.T, out=self.buffer)
        logits = self.buffer.float()
        if self.temperature != 1:
            logits /= self.temperature
        return logits

    def joined(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """A tensor reduced in place over the ranks that share the vocabulary."""
        if self.group is not None:
            dist.all_reduce(tensor, operation, self.group)
        return tensor

    def own(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of this rank's logits, (rows, 1), for tokens; and 1 where it has the token, else 0: (rows, 1)."""
        columns = tokens.unsqueeze(1) - self.first
        if self.group is None:
            return columns, torch.ones_like(columns)
        here = (columns >= 0) & (columns < len(self.weight))
        return columns.where(here, 0), here.to(torch.int64)

    def accumulate(self, slope: Tensor, part: Tensor, needed: tuple[bool, ...]) -> None:
        """Add a chunk's gradients.

        Args:
            slope: (rows, vocabulary), float32; the derivative of the objective by the logits.
            part: (rows, hidden).
            needed: for hidden states, weight and bias, True if their gradient is needed.
        """
        if needed[0]:
            self.hidden_grads.append(slope.to(self.narrow.dtype) @ self.narrow)
        low, part = slope.to(self.dtype), part.to(self.dtype)
        if needed[1]:
            if self.weight_grad is None:
                self.weight_grad = (low.T @ part).float()
            elif self.dtype == torch.float32:
                self.weight_grad.addmm_(low.T, part)
            else:
                self.weight_grad += low.T @ part
        if self.bias is not None and needed[2]:
            own = slope.sum(dim=0)
            self.bias_grad = own if self.bias_grad is None else self.bias_grad + own

    def gradients(self, n: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the n hidden states, the weight and the bias; None where not needed."""
        hidden_grad = self.joined(torch.cat(self.hidden_grads)[:n]) if self.hidden_grads else None
        return (hidden_grad, self.weight_grad, self.bias_grad)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor,
        temperature: float, with_entropies: bool, group: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        log_probs, normalizers, entropies = [], [], []
        head = _Head(weight, bias, temperature, group)
        with head.multiplying():
            for part, chosen in head.chunks(hidden, tokens):
                logits = head.logits(part)
                # Passes over the logits dominate the time: few, and in place.
                columns, here = head.own(chosen)
                picked = logits.gather(1, columns) * here
                peak = head.joined(logits.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
                logits -= peak
                shares = logits.exp() if with_entropies else logits.exp_()
                sums = [picked.squeeze(1), shares.sum(dim=-1)]
                if with_entropies:
                    sums.append(torch.linalg.vecdot(shares, logits))
                own, total, *products = head.joined(torch.stack(sums))
                normalizer = peak.squeeze(1) + total.log()
                normalizers.append(normalizer)
                log_probs.append(own - normalizer)
                entropies += [total.log() - product / total for product in products]
        ctx.save_for_backward(hidden, weight, bias, tokens, torch.cat(normalizers)[: len(tokens)])
        ctx.temperature, ctx.group = temperature, group
        entropy = torch.cat(entropies)[: len(tokens)] if with_entropies else log_probs[0].new_empty(0)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs)[: len(tokens)], entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        hidden, weight, bias, tokens, normalizers = ctx.saved_tensors
        head = _Head(weight, bias, ctx.temperature, ctx.group)
        slopes = grad / ctx.temperature
        with head.multiplying():
            for part, chosen, normalizer, share in head.chunks(hidden, tokens, normalizers, slopes):
                # d log p(token) / d logits = one-hot(token) - p
                slope = head.logits(part).sub_(normalizer.unsqueeze(1)).exp_().mul_(-share.unsqueeze(1))
                columns, here = head.own(chosen)
                slope.scatter_add_(1, columns, share.unsqueeze(1) * here)
                head.accumulate(slope, part, ctx.needs_input_grad)
        grads = zip(head.gradients(len(tokens)), (hidden, weight, bias), strict=True)
        return *(None if grad is None else grad.to(leaf.dtype) for grad, leaf in grads), None, None, None, None


class _HeadLogProbSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor,
        temperature: float, grad_enabled: bool, group: Any,
    ) -> Tensor:  # fmt: skip
        head = _Head(weight, bias, temperature, group)
        result = torch.zeros((), device=weight.device)
        with head.multiplying():
            for part, chosen, real in head.chunks(hidden, tokens, torch.ones_like(tokens, dtype=torch.float32)):
                logits = head.logits(part)
                columns, here = head.own(chosen)
                picked = logits.gather(1, columns) * here
                peak = head.joined(logits.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
                shares = logits.sub_(peak).exp_()
                own, total = head.joined(torch.stack([picked, shares.sum(dim=-1, keepdim=True)]))
                result += (own - peak - total.log()).squeeze(1) @ real
                if grad_enabled and any(ctx.needs_input_grad):
                    weights = real.unsqueeze(1) / temperature
                    slope = shares.mul_(-weights / total).scatter_add_(1, columns, weights * here)
                    head.accumulate(slope, part, ctx.needs_input_grad)
        ctx.save_for_backward(*head.gradients(len(tokens)))
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (hidden, weight, bias)]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if own is None else (own * grad).to(dtype) for own, dtype in grads), None, None, None, None
