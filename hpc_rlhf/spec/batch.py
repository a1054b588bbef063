"""Batch arithmetic: micro batch x accumulation x ranks = global batch, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.training import StageSpec, TrainingSpec


@dataclass(frozen=True)
class Batch:
    """How the samples of one optimizer step are shared out.

    Attributes:
        micro: samples in one forward and backward pass on one rank.
        accumulation: passes whose gradients are summed before a step.
        ranks: ranks that share a step, each with samples of its own; under tensor parallelism, groups of ranks.
        global_: samples in one step; always micro * accumulation * ranks.
    """

    micro: int
    accumulation: int
    ranks: int
    global_: int

    def check_ds_config(self, config: Mapping[str, object], where: str) -> None:
        """Check the batch sizes of a rendered DeepSpeed config.

        Raises:
            HpcRlhfError: they are not these.
        """
        sizes = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
            "train_batch_size": self.global_,
        }
        for key, size in sizes.items():
            default = size if key == "train_batch_size" else None
            if config.get(key, default) != size:
                raise HpcRlhfError(
                    f"{key} is {config.get(key, 'missing')}, and must be {size}, as the job spec sets it",
                    where=where,
                    hint="render batch.micro and batch.accumulation in templates/ds_config.json.j2; "
                    "set micro_batch and global_batch in the job spec",
                )


def data_ranks(stage: StageSpec, name: str) -> int:
    """Ranks of a stage with samples of their own: groups of ranks under tensor parallelism.

    Raises:
        ValueError: a node's ranks are no whole groups; the text names the values of tensor_parallel that would do.
    """
    group = stage.tensor_parallel if isinstance(stage, TrainingSpec) else 1
    here = stage.slurm.tasks_per_node
    if here % group:
        fits = [str(d) for d in range(1, here + 1) if here % d == 0]
        raise ValueError(
            f"{name}'s tensor_parallel {group} does not divide the {here} ranks of a node, within which layers are "
            f"shared; use tensor_parallel: {' or '.join(fits)}"
        )
    return stage.slurm.ranks // group


def derive_batch(stage: StageSpec, name: str) -> Batch:
    """The batch of a stage.

    Raises:
        ValueError: see ``data_ranks``; or global_batch is not a whole number of passes over all ranks; the text names the values
            of global_batch, and of micro_batch, that would do.
    """
    micro, ranks = stage.micro_batch, data_ranks(stage, name)
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
    sharers = "ranks" if ranks == stage.slurm.ranks else "groups of ranks"
    raise ValueError(
        f"{name}'s global_batch {wanted} is not a multiple of {unit} (micro_batch {micro} x {ranks} {sharers}); "
        f"use {' or '.join(fixes)}"
    )
