"""How far a stage has got with its optimizer steps on an experience, and how a checkpoint keeps that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.models.engine import StepResult
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.experience import Evaluated

E = TypeVar("E", bound=Evaluated)


@dataclass
class Progress(Generic[E]):
    """A rank's experience, and how far learning from it has come.

    Attributes:
        networks: the names of the networks that learn from each minibatch, in this order.
        stats: sums so far, by name; scalars, added to in place.
        kl_before: ``stats["approx_kl"]`` before the minibatch in progress.
        norms: for each network, the sum of the gradient norms of its applied optimizer steps, and their number.
        done: optimizer steps made, of all networks together.
        skipped: optimizer steps that DeepSpeed skipped because a gradient was not finite.
        actor_skipped: the actor's step on the minibatch in progress was skipped.
    """

    experience: E
    networks: Sequence[str]
    stats: dict[str, Tensor]
    kl_before: Tensor
    norms: dict[str, tuple[float, int]] = field(default_factory=dict)
    done: int = 0
    skipped: int = 0
    actor_skipped: bool = False

    @classmethod
    def begin(cls, experience: E, networks: Sequence[str], stats: Sequence[str]) -> Progress[E]:
        zero = torch.zeros((), device=experience.mask.device)
        norms = dict.fromkeys(networks, (0.0, 0))
        return cls(experience, networks, {name: zero.clone() for name in stats}, zero, norms)

    def copy(self) -> Progress[E]:
        """A copy that later steps leave alone."""
        return replace(self, stats={name: value.clone() for name, value in self.stats.items()}, norms={**self.norms})

    def count(self, network: str, result: StepResult) -> None:
        """Count an optimizer step."""
        self.skipped += not result.applied
        if result.applied:
            total, steps = self.norms[network]
            self.norms[network] = (total + result.grad_norm, steps + 1)

    def sums(self) -> dict[str, float]:
        """The stats, ``skipped``, and the mean gradient norm of each network."""
        norms = {
            f"{name}_grad_norm": total / steps if steps else math.nan for name, (total, steps) in self.norms.items()
        }
        sums = {name: value.item() for name, value in self.stats.items()}
        return {**sums, **norms, "skipped": float(self.skipped)}

    def save(self, snapshot: Snapshot, rank: int) -> None:
        """Add it to a checkpoint, without ``done``, which follows from the checkpoint's part number."""
        rollout = self.experience.rollout
        tensors = {name: getattr(self.experience, name) for name in _tensors(type(self.experience))}
        for name, rows in (("prompts", rollout.prompts), ("answers", rollout.responses)):
            packed = Ragged.of(rows)
            tensors[name], tensors[f"{name}.lengths"] = packed.ids, torch.tensor(packed.lengths)
        tensors["sums"] = torch.stack(list(self.stats.values()))
        tensors["moved"] = self.kl_before
        tensors["skipped"] = torch.tensor([self.skipped, int(self.actor_skipped)])
        tensors["norms"] = torch.tensor([self.norms[network] for network in self.networks], dtype=torch.float64)
        snapshot.tensors(_file(rank), tensors)

    @classmethod
    def load(
        cls, folder: Path, rank: int, done: int, device: torch.device, kind: type[E], networks: Sequence[str],
        stats: Sequence[str],
    ) -> Progress[E]:  # fmt: skip
        """What ``save`` wrote.

        Args:
            kind: the class of the experience.
            networks, stats: as for ``begin``.
        """
        tensors = load_file(folder / _file(rank), str(device))
        prompts, responses = (
            Ragged(tensors[name], tuple(tensors[f"{name}.lengths"].tolist())).rows() for name in ("prompts", "answers")
        )
        tensors = {**_missing(tensors, len(networks)), **tensors}
        own = {name: tensors[name] for name in _tensors(kind)}
        experience = kind(rollout=Rollout.of(prompts, responses, device), **own)
        sums = tensors["sums"].clone()
        padded = [*sums.unbind(), *sums.new_zeros(len(stats) - len(sums)).unbind()]
        norms = {
            name: (total, int(steps)) for name, (total, steps) in zip(networks, tensors["norms"].tolist(), strict=True)
        }
        skipped, actor_skipped = tensors["skipped"].tolist()
        return cls(
            experience, networks, dict(zip(stats, padded, strict=True)), tensors["moved"], norms, done, skipped,
            bool(actor_skipped),
        )  # fmt: skip


def _tensors(kind: type[Evaluated]) -> list[str]:
    return [each.name for each in fields(kind) if each.name != "rollout"]


def _missing(tensors: dict[str, Tensor], networks: int) -> dict[str, Tensor]:
    """What checkpoints of earlier versions do not have."""
    scores = tensors["scores"]
    return {
        "score_clipped": torch.full_like(scores, torch.nan),
        "value_scale": scores.new_tensor([0.0, 1.0]),
        "norms": torch.zeros(networks, 2, dtype=torch.float64),
        "skipped": torch.zeros(2, dtype=torch.int64),
    }


def _file(rank: int) -> str:
    return f"experience-{rank:05d}.safetensors"
