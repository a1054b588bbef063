"""How far PPO has got with its optimizer steps on an experience, and how a checkpoint keeps that."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.models.engine import StepResult
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.experience import Experience
from hpc_rlhf.train.stages.ppo.metrics import STATS

_TENSORS = [each.name for each in fields(Experience) if each.name != "rollout"]


class Network(Enum):
    """The networks that learn from each minibatch, in this order."""

    ACTOR = 0
    CRITIC = 1


@dataclass(frozen=True)
class Cursor:
    """The next optimizer step on an experience."""

    epoch: int = 0
    minibatch: int = 0
    network: Network = Network.ACTOR

    @classmethod
    def after(cls, steps: int, minibatches: int) -> Cursor:
        """The position after a number of optimizer steps."""
        number, network = divmod(steps, len(Network))
        return cls(*divmod(number, minibatches), Network(network))

    def steps(self, minibatches: int) -> int:
        """Optimizer steps before this one."""
        return len(Network) * (self.epoch * minibatches + self.minibatch) + self.network.value

    def next(self, minibatches: int) -> Cursor:
        return Cursor.after(self.steps(minibatches) + 1, minibatches)


@dataclass
class Progress:
    """A rank's experience, and how far learning from it has come.

    Attributes:
        stats: sums so far, by the names in STATS; scalars, added to in place.
        kl_before: ``stats["approx_kl"]`` before the minibatch in progress.
        norms: for each network, the sum of the gradient norms of its applied optimizer steps, and their number.
        skipped: optimizer steps of both networks that DeepSpeed skipped because a gradient was not finite.
        actor_skipped: the actor's step on the minibatch in progress was skipped.
    """

    experience: Experience
    stats: dict[str, Tensor]
    kl_before: Tensor
    norms: dict[Network, tuple[float, int]] = field(default_factory=lambda: dict.fromkeys(Network, (0.0, 0)))
    cursor: Cursor = Cursor()
    skipped: int = 0
    actor_skipped: bool = False

    @classmethod
    def begin(cls, experience: Experience) -> Progress:
        zero = torch.zeros((), device=experience.mask.device)
        return cls(experience, {name: zero.clone() for name in STATS}, zero)

    def copy(self) -> Progress:
        """A copy that later steps leave alone."""
        return replace(self, stats={name: value.clone() for name, value in self.stats.items()}, norms={**self.norms})

    def count(self, network: Network, result: StepResult) -> None:
        """Count an optimizer step."""
        self.skipped += not result.applied
        if result.applied:
            total, steps = self.norms[network]
            self.norms[network] = (total + result.grad_norm, steps + 1)

    def sums(self) -> dict[str, float]:
        """What ``metrics.summarize`` takes."""
        norms = {network: total / steps if steps else math.nan for network, (total, steps) in self.norms.items()}
        return {
            **{name: value.item() for name, value in self.stats.items()},
            "actor_grad_norm": norms[Network.ACTOR],
            "critic_grad_norm": norms[Network.CRITIC],
            "skipped": float(self.skipped),
        }

    def save(self, snapshot: Snapshot, rank: int) -> None:
        """Add it to a checkpoint, without the cursor, which is the checkpoint's part number."""
        rollout = self.experience.rollout
        tensors = {name: getattr(self.experience, name) for name in _TENSORS}
        for name, rows in (("prompts", rollout.prompts), ("answers", rollout.responses)):
            packed = Ragged.of(rows)
            tensors[name], tensors[f"{name}.lengths"] = packed.ids, torch.tensor(packed.lengths)
        tensors["sums"] = torch.stack([self.stats[name] for name in STATS])
        tensors["moved"] = self.kl_before
        tensors["skipped"] = torch.tensor([self.skipped, int(self.actor_skipped)])
        tensors["norms"] = torch.tensor([self.norms[network] for network in Network], dtype=torch.float64)
        snapshot.tensors(_file(rank), tensors)

    @classmethod
    def load(cls, folder: Path, rank: int, cursor: Cursor, device: torch.device) -> Progress:
        tensors = load_file(folder / _file(rank), str(device))
        prompts, responses = (
            Ragged(tensors[name], tuple(tensors[f"{name}.lengths"].tolist())).rows() for name in ("prompts", "answers")
        )
        tensors = {**_missing(tensors), **tensors}
        experience = Experience(
            rollout=Rollout.of(prompts, responses, device), **{name: tensors[name] for name in _TENSORS}
        )
        sums = tensors["sums"].clone()
        stats = dict(zip(STATS, [*sums.unbind(), *sums.new_zeros(len(STATS) - len(sums)).unbind()], strict=True))
        norms = {
            network: (total, int(steps))
            for network, (total, steps) in zip(Network, tensors["norms"].tolist(), strict=True)
        }
        skipped, actor_skipped = tensors["skipped"].tolist()
        return cls(experience, stats, tensors["moved"], norms, cursor, skipped, bool(actor_skipped))


def _missing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What checkpoints of earlier versions do not have."""
    scores = tensors["scores"]
    return {
        "score_clipped": torch.full_like(scores, torch.nan),
        "value_scale": scores.new_tensor([0.0, 1.0]),
        "norms": torch.zeros(len(Network), 2, dtype=torch.float64),
        "skipped": torch.zeros(2, dtype=torch.int64),
    }


def _file(rank: int) -> str:
    return f"experience-{rank:05d}.safetensors"
