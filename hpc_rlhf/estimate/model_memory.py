"""Bytes of one model on one GPU: in training, with what its passes and steps add for a while, or frozen."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.estimate.activations import ITEM, Pass
from hpc_rlhf.estimate.parameters import Architecture
from hpc_rlhf.spec.batch import Batch
from hpc_rlhf.spec.sizes import BUCKET, LIVE
from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.spec.training import LoraSpec, StageSpec, TrainingSpec

# DeepSpeed averages float32 gradients without ZeRO in buffers of so many numbers.
AVERAGED = 500_000_000

Parts = dict[str, int]


@dataclass(frozen=True)
class Trained:
    """A model in training on one rank.

    Attributes:
        always: bytes by part from the beginning to the end.
        moments: bytes by part of what is added in passes, while gradients are reduced at a pass's end and, where their
            buffer is full sooner, in its midst, and in optimizer steps.
    """

    always: Parts
    moments: dict[str, Parts]


def added(*all_: Parts) -> Parts:
    """The sums by part."""
    return {part: sum(each.get(part, 0) for each in all_) for part in {p: 0 for each in all_ for p in each}}


def scored_parameters(model: Architecture) -> int:
    """Parameters of a body with a score head."""
    return model.body + model.hidden


def _cut(model: Architecture, total: int, ways: int) -> int:
    """Parameters of which a rank has its own part, where layers are cut."""
    return total - model.inside + -(-model.inside // ways)


def in_training(work: Pass, batch: Batch, scored: bool = False) -> Trained:
    """A model in training: its weights, gradients and optimizer, and what passes and steps add.

    Under ZeRO 3, gradients' shards and the buffer that they are reduced in are there all the time, as DeepSpeed has it.

    Args:
        work: a pass over a micro-batch.
        scored: it has a score head in place of an output head.
    """
    model, stage, item = work.model, work.stage, work.item
    ways, lora, zero = stage.tensor_parallel, stage.lora, stage.zero
    total = _cut(model, scored_parameters(model) if scored else model.parameters, ways)
    ranks = stage.slurm.ranks // ways
    adapters = 0 if lora is None else -(-model.adapters(lora) // ways)
    trained = _learnt(total, adapters, lora, model.hidden if scored else 0)
    shard = -(-trained // ranks)
    bucket = item * min(BUCKET, trained) if zero else 0
    gradients = item * (trained if zero < 2 else shard)
    always = {"weights": weights(total + adapters, stage, ranks), "optimizer": 0}
    if not stage.offload_optimizer:
        # Masters, where the weights are not float32 themselves, and two moments; 1-bit Adam adds what it has not sent.
        masters = 4 if item == 2 or zero else 0
        sent = 4 if stage.optimizer == "onebit-adam" else 0
        always["optimizer"] = (masters + 8 + sent) * (shard if zero else trained)
    elif zero < 3:
        gradients = 0 if zero == 2 else gradients  # they go to the CPU as they come
    if zero == 3:
        always |= {"gradients": 0 if stage.offload_optimizer else gradients, "buffers": bucket}
    gathered = gathered_weights(model, total + adapters, item) if zero == 3 else 0
    if zero == 3 and work.alternating:
        gathered = item * (min(total + adapters, LIVE) + model.largest)
    waiting = gradients if batch.accumulation > 1 and zero < 3 else 0
    ended = gradients if zero < 3 else 0
    passing = {"activations": work.activations, "logits": work.logits, "gathered weights": gathered}
    held = bucket if zero in (1, 2) else 0
    moments = {"passes": {**passing, "gradients": waiting, "buffers": held}}
    sent_at_once = bucket if zero > 1 and ranks > 1 else 0  # what a full bucket is reduced in
    moments["reduction"] = {"gathered weights": gathered, "gradients": ended, "buffers": held + sent_at_once}
    if zero > 1 and trained > BUCKET:
        # The first full buckets go while most activations are still there.
        still = int(work.activations * (1 - BUCKET / trained))
        moments["first reduction"] = added(
            {"activations": still, "gathered weights": gathered},
            {"gradients": waiting, "buffers": held + sent_at_once},
        )
    moments["steps"] = _step(stage, trained, shard, item, ended, held if ranks == 1 else 0)
    return Trained(always, moments)


def _step(stage: TrainingSpec, trained: int, shard: int, item: int, gradients: int, held: int) -> Parts:
    """What an optimizer step adds: gradients in a row, and as float32."""
    if stage.offload_optimizer:
        return {"gradients": gradients}
    wide = 4 if item == 2 else 0
    if not stage.zero:
        flat = wide * trained or item * min(trained, AVERAGED)
        return {"gradients": gradients, "gradients for the step": flat}
    return {"gradients for the step": (item + wide) * shard, "buffers": held}


def _learnt(total: int, adapters: int, lora: LoraSpec | None, score: int) -> int:
    if lora is None:
        return total
    return adapters + (score if lora.only else total)


def weights(count: int, stage: StageSpec, ranks: int) -> int:
    """Bytes of weights all the time: a share of them under ZeRO 3."""
    if stage.zero != 3:
        return ITEM[stage.precision] * count
    return 0 if stage.offload_params else ITEM[stage.precision] * -(-count // ranks)


def gathered_weights(model: Architecture, count: int, item: int) -> int:
    """Bytes of the weights that stand whole in a pass under ZeRO 3, with what they are gathered in."""
    return item * (min(count, LIVE) + min(count, max(LIVE, model.largest)))


def frozen(model: Architecture, count: int, stage: StageSpec, of: TrainingSpec) -> int:
    """Bytes of a model that does not train: sharded under ZeRO 3 and cut under tensor parallelism, whole otherwise."""
    ways = of.tensor_parallel
    return weights(_cut(model, count, ways), stage, of.slurm.ranks // ways)


def averaged(actor: Architecture, stage: PpoSpec) -> int:
    """Bytes of a rank's share of the moving average."""
    ways = stage.tensor_parallel
    adapters = 0 if stage.lora is None else actor.adapters(stage.lora)
    averaged = _learnt(_cut(actor, actor.parameters, ways), -(-adapters // ways), stage.lora, 0)
    return 4 * -(-averaged // (stage.slurm.ranks // ways))
