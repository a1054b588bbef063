"""1-bit Adam (arXiv 2102.02888): ranks exchange the signs of their momenta instead of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_rlhf.train.algorithms.compression import BLOCK, decode, encode, unpack_bits
from hpc_rlhf.train.checkpoint.shards import Shard
from hpc_rlhf.train.runtime import seeds

# Sums in a sketch of the gradient: it estimates the norm within 2 % (1 / sqrt(2 * SKETCH)).
SKETCH = 1024
# Lower bound of the root of a frozen variance, relative to the root mean square over its tensor. Adam would
# raise a variance that was too small; frozen, it would turn every later gradient there into a huge step. With
# a tenth, the first gradient of a weight that had none before moves it about as far as under Adam.
FLOOR = 0.1


class OneBitAdam(torch.optim.Optimizer):
    """AdamW whose ranks average momenta by their signs once the variance is frozen.

    It averages over the ranks itself: gradients must reach it as each rank computed them.

    For ``warmup`` steps it is AdamW on gradients averaged in float32. Then the variance is frozen. In each
    step a rank adds its gradient to its own momentum, divides by the root of the variance, adds the error of
    its last compression and sends the signs. The owner of each part averages what it receives, compresses
    that in the same way, and sends it to all.

    Two things differ from the paper. The division comes before the compression: the variance is the same on all ranks,
    so the average is too, and numbers that share a magnitude are of similar size. And a rank keeps its own momentum
    instead of the average that it received: a momentum of averages is an average of momenta, and a compression error
    then moves the weights once, not 1 / (1 - beta) times.

    Gradients are clipped by the norm of their average: exact during warm-up, afterwards estimated within 2 %
    from random sums of each rank's gradient, which are small enough to average whole.

    Attributes:
        grad_norm: norm of the last step's averaged gradient before clipping.
        bytes_sent: by this rank since the last ``take_bytes_sent``.
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
        """Allocate the state, once the parameters are the final ones.

        A step before this does nothing: DeepSpeed's wrapper for half precision replaces the model's
        parameters by float32 ones, and makes a step without gradients to allocate the state.
        """
        self._started = True
        parameters = self._parameters()
        self._sizes = [parameter.numel() for parameter in parameters]
        self._count, ranks = sum(self._sizes), dist.get_world_size()
        whole = ranks * BLOCK
        length = (self._count + whole - 1) // whole * whole
        device = parameters[0].device
        self.momentum, self.variance, self.worker_error = (torch.zeros(length, device=device) for _ in range(3))
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
        for parameter, part in zip(self._parameters(), gradient[: self._count].split(self._sizes), strict=True):
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
        """The same for the average of the ranks' momenta, as far as their signs give it."""
        self._clip(gradient, self._estimated_norm(gradient))
        self.momentum.lerp_(gradient, 1 - self.betas[0])
        return self._exchange(self.momentum / self._root())

    def _root(self) -> Tensor:
        """Root of the variance, with bias correction."""
        averaged = min(self.steps, self.warmup)
        return (self.variance / (1 - self.betas[1] ** averaged)).sqrt_().add_(self.eps)

    def _freeze(self) -> None:
        overall = float(self.variance.sum()) / self._count
        for part in self.variance[: self._count].split(self._sizes):
            part.clamp_(min=FLOOR**2 * (float(part.mean()) or overall))

    def _clip(self, gradient: Tensor, norm: float) -> None:
        self.grad_norm = norm
        if norm > self.clip_grad:
            gradient.mul_(self.clip_grad / norm)

    # Communication

    def _average(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
        # A ring all-reduce sends each part around twice.
        self._count_sent(2 * tensor.nbytes)

    def _estimated_norm(self, gradient: Tensor) -> float:
        """Norm of the ranks' average of a gradient (the sketch of Alon, Matias and Szegedy)."""
        flipped = torch.where(unpack_bits(self._flips), gradient, -gradient)
        sketch = flipped.view(-1, SKETCH).sum(dim=0)
        self._average(sketch)
        return float(sketch.norm())

    def _exchange(self, values: Tensor) -> Tensor:
        """The ranks' average of values, compressed in both directions."""
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
        compressed = encode(own.unsqueeze(0))
        torch.sub(own, decode(compressed)[0], out=self.server_error)
        dist.all_gather_into_tensor(parts, compressed)
        self._count_sent(parts.nbytes)
        return decode(parts).flatten()

    def _count_sent(self, size: float) -> None:
        """Count the bytes that a rank sends of a tensor that all ranks exchange: all but its own part."""
        ranks = dist.get_world_size()
        self.bytes_sent += size * (ranks - 1) / ranks

    def take_bytes_sent(self) -> float:
        sent, self.bytes_sent = self.bytes_sent, 0.0
        return sent

    # Checkpoints

    def pieces(self) -> Iterator[Shard]:
        """The state for a checkpoint. Momentum and compression errors are each rank's own."""
        rank = dist.get_rank()
        yield Shard("variance", 0, self.variance, mine=rank == 0)
        for name in ("momentum", "worker_error", "server_error"):
            yield Shard(f"{name} of rank {rank}", 0, getattr(self, name))
