"""How far learning from an experience has come, and how that is kept in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.rollout.experience import Experience, Rollout
from hpc_rlhf.train.stages.ppo.metrics import LEARNT

_TENSORS = [field.name for field in fields(Experience) if field.name != "rollout"]


@dataclass
class Progress:
    """A rank's experience, and what has been learnt from it.

    Attributes:
        sums: what happened so far, by the names in LEARNT; scalars, added to in place.
        moved: ``approx_kl`` of ``sums`` before the minibatch in progress.
        done: optimizer steps made; the actor's and the critic's count alike.
    """

    made: Experience
    sums: dict[str, Tensor]
    moved: Tensor
    done: int = 0

    @classmethod
    def begin(cls, made: Experience) -> Progress:
        zero = torch.zeros((), device=made.mask.device)
        return cls(made, {name: zero.clone() for name in LEARNT}, zero)

    def copy(self) -> Progress:
        """It as it is now."""
        return Progress(self.made, {name: s.clone() for name, s in self.sums.items()}, self.moved, self.done)

    def save(self, snapshot: Snapshot, rank: int) -> None:
        """Add it to a checkpoint; ``done`` is to be kept elsewhere."""
        rollout = self.made.rollout
        tensors = {name: getattr(self.made, name) for name in _TENSORS}
        for name, rows in (("prompts", rollout.prompts), ("answers", rollout.answers)):
            tensors[name] = torch.tensor([token for row in rows for token in row])
            tensors[f"{name}.lengths"] = torch.tensor([len(row) for row in rows])
        tensors["sums"] = torch.stack([self.sums[name] for name in LEARNT])
        tensors["moved"] = self.moved
        snapshot.tensors(_name(rank), tensors)

    @classmethod
    def load(cls, folder: Path, rank: int, done: int, device: torch.device) -> Progress:
        """Read back what ``save`` wrote."""
        tensors = load_file(folder / _name(rank), str(device))
        rollout = Rollout(
            *(_rows(tensors[name], tensors[f"{name}.lengths"].tolist()) for name in ("prompts", "answers"))
        )
        made = Experience(rollout, **{name: tensors[name] for name in _TENSORS})
        sums = dict(zip(LEARNT, tensors["sums"].clone().unbind(), strict=True))
        return cls(made, sums, tensors["moved"], done)


def _rows(flat: Tensor, lengths: Sequence[int]) -> list[list[int]]:
    tokens = flat.tolist()
    return [tokens[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]


def _name(rank: int) -> str:
    return f"experience-{rank:05d}.safetensors"
