"""1-bit Adam (arXiv 2102.02888): ranks send each other the signs of their momenta in place of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_rlhf.train.algorithms.compression import BLOCK, decode, encode, unpack_bits
from hpc_rlhf.train.checkpoint.shards import Piece
from hpc_rlhf.train.runtime import seeds

# Sums of a sketch of the gradient: its norm comes out within 2 % (one over the root of twice this).
SKETCH = 1024
# Least root of a frozen variance, as a share of the root mean square over its tensor. Adam would raise a
# variance that was too small; frozen, it would make every later gradient there a huge step. With a tenth, a
# weight that had no gradient before moves about as far by its first one as under Adam.
FLOOR = 0.1


class OneBitAdam(torch.optim.Optimizer):
    """AdamW whose ranks average momenta by signs, once the variance has been frozen.

    It averages over the ranks itself: whoever makes the gradients must leave them as each rank has them.

    For ``warmup`` steps it is AdamW on gradients that are averaged in float32. Then the variance stays as it is.
    Each step a rank takes its gradient into its own momentum, divides by the root of the variance, adds what its
    last compression left out, and sends the signs; the owner of each part averages what came, compresses that
    in the same way, and sends it to all.

    Two things differ from the paper. The division comes before the compression, not behind it: the variance is
    the same everywhere, so the average is too, and numbers that share a magnitude are then of like size. And a
    rank keeps its own momentum instead of the average that it got back: a momentum of averages is an average of
    momenta, and what compression gets wrong then moves the weights once, not 1 / (1 - beta) times.

    Gradients are clipped by their average's norm: known while all-reduced, afterwards estimated within 2 % from
    random sums of each rank's gradient, which are small enough to average whole.

    Args:
        clip_grad: largest norm of the averaged gradient.
        warmup: steps before the variance is frozen.

    Attributes:
        steps: made so far.
        grad_norm: of the last step's averaged gradient, before it was clipped.
        bytes_sent: by this rank since ``take_bytes_sent``.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], clip_grad: float,
        warmup: int, eps: float = 1e-8,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.betas, self.eps, self.clip_grad, self.warmup = betas, eps, clip_grad, warmup
        self.steps = 0
        self.grad_norm = 0.0
        self.bytes_sent = 0.0
        self._started = False

    def start(self) -> None:
        """Make the state, now that the parameters are those to be stepped.

        A step before this does nothing: DeepSpeed's wrapper for half precision puts float32 parameters in the
        place of the model's own, and makes a step without gradients to have the state allocated.
        """
        self._started = True
        parameters = self._parameters()
        self._sizes = [parameter.numel() for parameter in parameters]
        self._count, ranks = sum(self._sizes), dist.get_world_size()
        whole = ranks * BLOCK
        length = (self._count + whole - 1) // whole * whole
        device = parameters[0].device
        self.momentum, self.variance, self.worker_error = (
            torch.zeros(length, device=device) for _ in range(3)
        )
        self.server_error = torch.zeros(length // ranks, device=device)
        generator = torch.Generator().manual_seed(seeds.derive("sketch"))
        flips = torch.randint(0, 256, (length // 8,), generator=generator, dtype=torch.uint8)
        self._flips = flips.to(device)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    # Steps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step. Collective."""
        assert closure is None
        if not self._started:
            return
        self.steps += 1
        gradient = torch.zeros_like(self.momentum)
        for parameter, part in zip(
            self._parameters(), gradient[: self._count].split(self._sizes), strict=True
        ):
            if parameter.grad is not None:
                part.copy_(parameter.grad.flatten())
        direction = self._dense(gradient) if self.steps <= self.warmup else self._compressed(gradient)
        direction /= 1 - self.betas[0] ** self.steps
        parts = iter(direction[: self._count].split(self._sizes))
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(next(parts).view_as(parameter), alpha=-group["lr"])
        if self.steps == self.warmup:
            self._freeze()

    def _dense(self, gradient: Tensor) -> Tensor:
        """Adam's momentum over the root of its variance."""
        self._average(gradient)
        self._clip(gradient, float(gradient.norm()))
        self.momentum.lerp_(gradient, 1 - self.betas[0])
        self.variance.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        return self.momentum / self._root()

    def _compressed(self, gradient: Tensor) -> Tensor:
        """The same, of the average of the ranks' momenta, as far as their signs tell it."""
        self._clip(gradient, self._estimated_norm(gradient))
        self.momentum.lerp_(gradient, 1 - self.betas[0])
        return self._exchange(self.momentum / self._root())

    def _root(self) -> Tensor:
        """Root of the variance, its start from zero corrected."""
        seen = min(self.steps, self.warmup)
        return (self.variance / (1 - self.betas[1] ** seen)).sqrt_().add_(self.eps)

    def _freeze(self) -> None:
        everywhere = float(self.variance.sum()) / self._count
        for part in self.variance[: self._count].split(self._sizes):
            part.clamp_(min=FLOOR**2 * (float(part.mean()) or everywhere))

    def _clip(self, gradient: Tensor, norm: float) -> None:
        self.grad_norm = norm
        if norm > self.clip_grad:
            gradient.mul_(self.clip_grad / norm)

    # What ranks send each other

    def _average(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
        # Each part of a ring's all-reduce goes round twice.
        self._count_sent(2 * tensor.nbytes)

    def _estimated_norm(self, gradient: Tensor) -> float:
        """Norm of the ranks' average of a gradient (the sketch of Alon, Matias and Szegedy)."""
        flipped = torch.where(unpack_bits(self._flips), gradient, -gradient)
        sketch = flipped.view(-1, SKETCH).sum(dim=0)
        self._average(sketch)
        return float(sketch.norm())

    def _exchange(self, values: Tensor) -> Tensor:
        """The ranks' average of values, compressed on the way out and on the way back."""
        ranks = dist.get_world_size()
        values += self.worker_error
        values[self._count :] = 0
        parts = encode(values.view(ranks, -1))
        torch.sub(values, decode(parts).flatten(), out=self.worker_error)
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        self._count_sent(parts.nbytes)

        own = decode(received).mean(dim=0) + self.server_error
        own[max(0, self._count - dist.get_rank() * len(own)) :] = 0
        answer = encode(own.unsqueeze(0))
        torch.sub(own, decode(answer)[0], out=self.server_error)
        dist.all_gather_into_tensor(parts, answer)
        self._count_sent(parts.nbytes)
        return decode(parts).flatten()

    def _count_sent(self, size: float) -> None:
        """Count what a rank sends of something that goes round all ranks, less its own part."""
        ranks = dist.get_world_size()
        self.bytes_sent += size * (ranks - 1) / ranks

    def take_bytes_sent(self) -> float:
        """Bytes that this rank has sent since this was last asked."""
        sent, self.bytes_sent = self.bytes_sent, 0.0
        return sent

    # Checkpoints

    def pieces(self) -> Iterator[Piece]:
        """What a checkpoint keeps of it. A rank's momentum, and what its compressions have left out, are its own."""
        rank = dist.get_rank()
        yield Piece("variance", 0, self.variance, mine=rank == 0)
        for name in ("momentum", "worker_error", "server_error"):
            yield Piece(f"{name} of rank {rank}", 0, getattr(self, name))
