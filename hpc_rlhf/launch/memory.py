"""Bytes that a stage's models hold on each GPU all the time it trains, and what a rollout adds."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.architecture import Architecture, architecture
from hpc_rlhf.spec.batch import derive_batch
from hpc_rlhf.spec.gpus import gpu_bytes
from hpc_rlhf.spec.model import JobSpec
from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.spec.training import LoraSpec, StageSpec, TrainingSpec

_ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
# Numbers in the buffer through which gradients are reduced under ZeRO 1 and 2, and of the weights that stand whole at
# a time under ZeRO 3: those of templates/ds_config.json.j2.
_BUCKET, _LIVE = 200_000_000, 30_000_000
# DeepSpeed's own size of that buffer, which holds under ZeRO 3.
_BUCKET_3 = 500_000_000
# As rollout/engine.py has them: answers made at a time, and the shares of a GPU that a rollout takes at most.
_ROWS, _WEIGHTS_SHARE, _CACHE_SHARE = 64, 0.5, 0.2


@dataclass(frozen=True)
class Memory:
    """What a stage holds on each GPU.

    Attributes:
        parameters: of each model, by its name.
        parts: bytes by part; activations and logits, which depend on the batch, are not among them.
        gpu: bytes of a GPU; None where the spec does not say.
    """

    parameters: dict[str, int]
    parts: dict[str, int]
    gpu: int | None

    @property
    def held(self) -> int:
        return sum(self.parts.values())

    @property
    def left(self) -> int | None:
        """Bytes left for activations, logits and CUDA itself; below 0 where the models alone do not fit."""
        return None if self.gpu is None else self.gpu - self.held


def stage_memory(spec: JobSpec, name: str) -> Memory:
    """What a stage that trains holds on each of its GPUs.

    Raises:
        HpcRlhfError: a model's configuration is not here, or is not of a family that is counted.
    """
    stage = spec.stage(name)
    assert isinstance(stage, TrainingSpec), name
    gpu = None if stage.slurm.gpu is None else gpu_bytes(stage.slurm.gpu)
    if name == "reward":
        model = architecture(spec.models.reward or spec.models.actor, "models.reward")
        return Memory({"reward": _scored(model)}, _trained(model, stage, scored=True), gpu)
    actor = architecture(spec.models.actor, "models.actor")
    parts, parameters = _trained(actor, stage), {"actor": actor.parameters}
    if name == "dpo" and not (stage.lora is not None and stage.lora.only):
        parts["ref"] = _frozen(actor, actor.parameters, stage.strategies["ref"], stage)
    if isinstance(stage, PpoSpec):
        reward = architecture(spec.models.reward or spec.models.actor, "models.reward")
        parameters["critic"] = _scored(reward)
        parts["ref"] = _frozen(actor, actor.parameters, stage.strategies["ref"], stage)
        parts["reward"] = _frozen(reward, _scored(reward), stage.strategies["reward"], stage)
        parts["critic"] = sum(_trained(reward, stage.of_critic, scored=True).values())
        longest = spec.data.max_prompt_tokens + spec.data.max_answer_tokens
        parts |= _rollout(actor, stage, longest, gpu)
    return Memory(parameters, {part: size for part, size in parts.items() if size}, gpu)


def _scored(model: Architecture) -> int:
    """Parameters of a body with a score head."""
    return model.body + model.hidden


def _cut(model: Architecture, total: int, ways: int) -> int:
    """Parameters of which a rank has its own part, where layers are cut."""
    return total - model.inside + -(-model.inside // ways)


def _trained(model: Architecture, stage: TrainingSpec, scored: bool = False) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer of a model in training."""
    ways, lora = stage.tensor_parallel, stage.lora
    total = _cut(model, _scored(model) if scored else model.parameters, ways)
    ranks, item = stage.slurm.ranks // ways, _ITEM[stage.precision]
    adapters = 0 if lora is None else -(-model.adapters(lora) // ways)
    trained = _learnt(total, adapters, lora, model.hidden if scored else 0)
    shard = -(-trained // ranks)
    # Masters, where the weights are not float32 themselves, and two moments; 1-bit Adam adds what it has not sent.
    masters = 4 if item == 2 or stage.zero else 0
    optimizer = (masters + 8 + (4 if stage.optimizer == "onebit-adam" else 0)) * (
        shard if stage.zero else trained
    )
    weights = _weights(total + adapters, stage, ranks)
    wide = 4 if stage.zero == 1 else item  # ZeRO 1 adds gradients up, and sends them, in float32
    bucket = wide * {1: _BUCKET, 2: _BUCKET, 3: _BUCKET_3}.get(stage.zero, 0)
    if stage.offload_optimizer:
        return {"weights": weights, "gradients": bucket, "optimizer": 0}
    gradients = bucket + wide * (trained if stage.zero < 2 else shard)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def _learnt(total: int, adapters: int, lora: LoraSpec | None, score: int) -> int:
    if lora is None:
        return total
    return adapters + (score if lora.only else total)


def _weights(count: int, stage: StageSpec, ranks: int) -> int:
    if stage.zero != 3:
        return _ITEM[stage.precision] * count
    shard = 0 if stage.offload_params else -(-count // ranks)
    return _ITEM[stage.precision] * (shard + min(count, _LIVE))


def _frozen(model: Architecture, count: int, stage: StageSpec, of: TrainingSpec) -> int:
    """Bytes of a model that does not train: sharded under ZeRO 3 and cut under tensor parallelism, whole otherwise."""
    ways = of.tensor_parallel
    return _weights(_cut(model, count, ways), stage, of.slurm.ranks // ways)


def _rollout(actor: Architecture, stage: PpoSpec, longest: int, gpu: int | None) -> dict[str, int]:
    """The moving average, and what lasts as long as a rollout: the actor gathered, and keys and values."""
    item, ways = _ITEM[stage.precision], stage.tensor_parallel
    ranks = stage.slurm.ranks // ways
    whole = 0
    if stage.zero == 3:
        whole = item * actor.parameters
    elif (
        ways > 1 or stage.lora is not None
    ):  # what is not cut or adapted is shared with the actor in training
        whole = item * actor.inside
    batch = derive_batch(stage, "ppo")
    answers = -(-batch.micro * batch.accumulation * stage.minibatches // ways)
    cache = item * actor.kv * longest * min(_ROWS, answers)
    if gpu is not None:
        whole, cache = min(whole, int(_WEIGHTS_SHARE * gpu)), min(cache, int(_CACHE_SHARE * gpu))
    adapters = 0 if stage.lora is None else actor.adapters(stage.lora)
    averaged = _learnt(_cut(actor, actor.parameters, ways), -(-adapters // ways), stage.lora, 0)
    return {"EMA": 4 * -(-averaged // ranks) if stage.ema else 0, "gathered actor": whole, "KV cache": cache}


def run_memory(spec: JobSpec) -> dict[str, Memory | HpcRlhfError]:
    """What each stage that trains holds, or why that is not known."""
    found: dict[str, Memory | HpcRlhfError] = {}
    for name in spec.trained:
        try:
            found[name] = stage_memory(spec, name)
        except HpcRlhfError as error:
            found[name] = error
    return found
