"""Batch arithmetic: micro batch x accumulation x ranks = global batch, exactly."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.spec.training import StageSpec, TrainingSpec


@dataclass(frozen=True)
class Batch:
    """How the samples of one optimizer step are shared out.

    Attributes:
        micro: samples in one forward and backward pass on one rank.
        accumulation: passes whose gradients are summed before a step.
        ranks: ranks that share a step.
        global_: samples in one step; always micro * accumulation * ranks.
    """

    micro: int
    accumulation: int
    ranks: int
    global_: int


def derive_batch(stage: StageSpec, name: str) -> Batch:
    """The batch of a stage.

    Raises:
        ValueError: global_batch is not a whole number of passes over all ranks; the text names the values
            of global_batch, and of micro_batch, that would do.
    """
    micro, ranks = stage.micro_batch, stage.slurm.ranks
    unit = micro * ranks
    asked = stage.global_batch if isinstance(stage, TrainingSpec) else None
    wanted = unit if asked is None else asked
    if wanted % unit == 0:
        return Batch(micro, wanted // unit, ranks, wanted)
    below = wanted // unit * unit
    fixes = [f"global_batch: {value}" for value in (below, below + unit) if value]
    if wanted % ranks == 0:
        share = wanted // ranks
        fixes.append(f"micro_batch: {max(d for d in range(1, min(micro, share) + 1) if share % d == 0)}")
    raise ValueError(
        f"{name}'s global_batch {wanted} is not a multiple of {unit} (micro_batch {micro} x {ranks} ranks); "
        f"use {' or '.join(fixes)}"
    )
