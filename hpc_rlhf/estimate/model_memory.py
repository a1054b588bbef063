"""Memory of one model on one GPU: in training, with what passes and steps add for a while, or frozen."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.estimate.activations import ITEM, Pass
from hpc_rlhf.estimate.parameters import Architecture
from hpc_rlhf.spec.batch import Batch
from hpc_rlhf.spec.sizes import BUCKET, LIVE
from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.spec.training import LoraSpec, StageSpec, TrainingSpec

# Without ZeRO, DeepSpeed reduces float32 gradients in buffers of this many numbers.
_FP32_BUCKET = 500_000_000

Parts = dict[str, int]


@dataclass(frozen=True)
class ModelMemory:
    """A model in training on one rank.

    Attributes:
        always: bytes by part, from start to end.
        moments: bytes by part of what is added during passes, while gradients are reduced (at the end of a
            pass, or before, when their buffer is full), and during optimizer steps.
    """

    always: Parts
    moments: dict[str, Parts]


def added(*all_: Parts) -> Parts:
    """The sums by part."""
    return {part: sum(each.get(part, 0) for each in all_) for part in {p: 0 for each in all_ for p in each}}


def scored_parameters(model: Architecture) -> int:
    """Parameters of a body with a score head."""
    return model.body + model.hidden


def _on_rank(model: Architecture, total: int, ways: int) -> int:
    """Parameters on one rank of a tensor-parallel group."""
    return total - model.inside + -(-model.inside // ways)


def in_training(work: Pass, batch: Batch, scored: bool = False) -> ModelMemory:
    """A model in training: its weights, gradients and optimizer, and what passes and steps add.

    Under ZeRO 3, DeepSpeed holds the gradient shards and the reduction buffer all the time.

    Args:
        work: a pass over a micro-batch.
        scored: it has a score head instead of an output head.
    """
    model, stage, item = work.model, work.stage, work.item
    ways, lora, zero = stage.tensor_parallel, stage.lora, stage.zero
    total = _on_rank(model, scored_parameters(model) if scored else model.parameters, ways)
    ranks = stage.slurm.ranks // ways
    adapters = 0 if lora is None else -(-model.adapters(lora) // ways)
    trained = _trained(total, adapters, lora, model.hidden if scored else 0)
    shard = -(-trained // ranks)
    bucket = item * min(BUCKET, trained) if zero else 0
    gradients = item * (trained if zero < 2 else shard)
    always = {"weights": weights(total + adapters, stage, ranks), "optimizer": 0}
    if not stage.offload_optimizer:
        # Master weights, unless the weights themselves are float32, and two moments; 1-bit Adam adds what it
        # has not sent.
        masters = 4 if item == 2 or zero else 0
        unsent = 4 if stage.optimizer == "onebit-adam" else 0
        always["optimizer"] = (masters + 8 + unsent) * (shard if zero else trained)
    elif zero < 3:
        gradients = 0 if zero == 2 else gradients  # ZeRO 2 moves them to the CPU as they are computed
    if zero == 3:
        always |= {"gradients": 0 if stage.offload_optimizer else gradients, "buffers": bucket}
    gathered = gathered_weights(model, total + adapters, item) if zero == 3 else 0
    if zero == 3 and work.alternating:
        gathered = item * (min(total + adapters, LIVE) + model.largest)
    accumulated = gradients if batch.accumulation > 1 and zero < 3 else 0
    complete = gradients if zero < 3 else 0
    passing = {"activations": work.activations, "logits": work.logits, "gathered weights": gathered}
    buffers = bucket if zero in (1, 2) else 0
    moments = {"passes": {**passing, "gradients": accumulated, "buffers": buffers}}
    reducing = bucket if zero > 1 and ranks > 1 else 0  # a full bucket is reduced in a copy
    moments["reduction"] = {"gathered weights": gathered, "gradients": complete, "buffers": buffers + reducing}
    if zero > 1 and trained > BUCKET:
        # The first full buckets are reduced while most activations still exist.
        remaining = int(work.activations * (1 - BUCKET / trained))
        moments["first reduction"] = added(
            {"activations": remaining, "gathered weights": gathered},
            {"gradients": accumulated, "buffers": buffers + reducing},
        )
    moments["steps"] = _step(stage, trained, shard, item, complete, buffers if ranks == 1 else 0)
    return ModelMemory(always, moments)


def _step(stage: TrainingSpec, trained: int, shard: int, item: int, gradients: int, buffers: int) -> Parts:
    """What an optimizer step adds: flat gradients, and their float32 copy."""
    if stage.offload_optimizer:
        return {"gradients": gradients}
    wide = 4 if item == 2 else 0
    if not stage.zero:
        flat = wide * trained or item * min(trained, _FP32_BUCKET)
        return {"gradients": gradients, "gradients for the step": flat}
    return {"gradients for the step": (item + wide) * shard, "buffers": buffers}


def _trained(total: int, adapters: int, lora: LoraSpec | None, score: int) -> int:
    """Parameters in training."""
    if lora is None:
        return total
    return adapters + (score if lora.only else total)


def weights(count: int, stage: StageSpec, ranks: int) -> int:
    """Bytes of weights from start to end: a shard of them under ZeRO 3."""
    if stage.zero != 3:
        return ITEM[stage.precision] * count
    return 0 if stage.offload_params else ITEM[stage.precision] * -(-count // ranks)


def gathered_weights(model: Architecture, count: int, item: int) -> int:
    """Bytes of the weights that ZeRO 3 gathers at a time in a pass, and of the buffers it gathers them in."""
    return item * (min(count, LIVE) + min(count, max(LIVE, model.largest)))


def frozen(model: Architecture, count: int, stage: StageSpec, of: TrainingSpec) -> int:
    """Bytes of a frozen model: sharded under ZeRO 3 and tensor parallelism, whole otherwise."""
    ways = of.tensor_parallel
    return weights(_on_rank(model, count, ways), stage, of.slurm.ranks // ways)


def moving_average(actor: Architecture, stage: PpoSpec) -> int:
    """Bytes of a rank's share of the moving average of the actor's weights."""
    ways = stage.tensor_parallel
    adapters = 0 if stage.lora is None else actor.adapters(stage.lora)
    count = _trained(_on_rank(actor, actor.parameters, ways), -(-adapters // ways), stage.lora, 0)
    return 4 * -(-count // (stage.slurm.ranks // ways))
