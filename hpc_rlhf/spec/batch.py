"""Batch arithmetic: micro batch x accumulation x ranks = global batch, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.stages.grpo import GrpoSpec
from hpc_rlhf.spec.training import StageSpec, TrainingSpec


@dataclass(frozen=True)
class Batch:
    """How the samples of an optimizer step are divided.

    Attributes:
        micro: samples per forward and backward pass on a rank.
        accumulation: passes whose gradients are accumulated before a step.
        ranks: data-parallel ranks; under tensor, sequence or pipeline parallelism, groups of ranks.
        global_: samples per step; always micro * accumulation * ranks.
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


def layer_groups(stage: StageSpec, name: str) -> int:
    """Groups of ranks of a stage that share layers by tensor parallelism.

    Raises:
        ValueError: tensor_parallel does not divide a node's ranks; the message lists the values that do.
    """
    group = stage.tensor_parallel if isinstance(stage, TrainingSpec) else 1
    ranks = stage.slurm.tasks_per_node
    _check_divides(f"{name}'s tensor_parallel", group, ranks, f"the {ranks} ranks of a node")
    return stage.slurm.ranks // group


def row_groups(stage: StageSpec, name: str) -> int:
    """Groups of ranks of a stage that share the tokens of packed rows by sequence parallelism.

    Raises:
        ValueError: see ``layer_groups``; or sequence_parallel does not divide these; the message lists the values that
            do.
    """
    groups, ways = layer_groups(stage, name), stage.sequence_parallel if isinstance(stage, TrainingSpec) else 1
    _check_divides(f"{name}'s sequence_parallel", ways, groups, _groups(stage, groups))
    return groups // ways


def data_ranks(stage: StageSpec, name: str) -> int:
    """Data-parallel ranks of a stage: groups of ranks under tensor, sequence or pipeline parallelism.

    Raises:
        ValueError: see ``row_groups``; or pipeline_parallel does not divide these.
    """
    groups = row_groups(stage, name)
    _check_divides(f"{name}'s pipeline_parallel", stage.pipeline_stages, groups, _groups(stage, groups))
    return groups // stage.pipeline_stages


def _groups(stage: StageSpec, count: int) -> str:
    return f"its {count} {'ranks' if count == stage.slurm.ranks else 'groups of tensor_parallel ranks'}"


def _check_divides(field: str, size: int, count: int, what: str) -> None:
    if count % size:
        fits = [str(d) for d in range(1, count + 1) if count % d == 0]
        fix = f"{field.rpartition(' ')[2]}: {' or '.join(fits)}"
        raise ValueError(f"{field} {size} does not divide {what}; use {fix}")


def derive_batch(stage: StageSpec, name: str) -> Batch:
    """The batch of a stage.

    Raises:
        ValueError: see ``data_ranks``; or global_batch is not a whole number of passes over all ranks; the
            message suggests values that are.
    """
    micro, ranks = stage.micro_batch, data_ranks(stage, name)
    unit = micro * ranks
    requested = stage.global_batch if isinstance(stage, TrainingSpec) else None
    total = unit if requested is None else requested
    if total % unit == 0:
        return Batch(micro, total // unit, ranks, total)
    below = total // unit * unit
    fixes = [f"global_batch: {value}" for value in (below, below + unit) if value]
    if total % ranks == 0:
        share = total // ranks
        fixes.append(f"micro_batch: {max(d for d in range(1, min(micro, share) + 1) if share % d == 0)}")
    sharers = "ranks" if ranks == stage.slurm.ranks else "groups of ranks"
    raise ValueError(
        f"{name}'s global_batch {total} is not a multiple of {unit} (micro_batch {micro} x {ranks} "
        f"{sharers}); "
        f"use {' or '.join(fixes)}"
    )


def check_groups(stage: StageSpec, name: str) -> None:
    """Check that every rank has whole groups of responses to a prompt.

    Raises:
        ValueError: it has not; the message suggests sizes with which it has.
    """
    if not isinstance(stage, GrpoSpec):
        return
    batch, size = derive_batch(stage, name), stage.group_size
    own = batch.global_ * stage.minibatches // batch.ranks
    if own % size:
        fits = [str(d) for d in range(2, own + 1) if own % d == 0]
        other = f"group_size: {' or '.join(fits)}, or " if fits else ""
        raise ValueError(
            f"{name}'s group_size {size} does not divide the {own} responses of a rank (global_batch {batch.global_} x "
            f"minibatches {stage.minibatches} / {batch.ranks} ranks); use {other}another global_batch"
        )
