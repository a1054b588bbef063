"""Bytes that a stage holds on each GPU: its models all the time, and what passes, steps and rollouts add for a while."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.activations import ITEM, Pass, as_trained
from hpc_rlhf.estimate.model_memory import (
    Parts,
    added,
    frozen,
    gathered_weights,
    in_training,
    moving_average,
    scored_parameters,
    weights,
)
from hpc_rlhf.estimate.parameters import Architecture, architecture
from hpc_rlhf.spec.batch import Batch, derive_batch
from hpc_rlhf.spec.gpus import gpu_bytes
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sizes import CACHE_SHARE, ROWS, WEIGHTS_SHARE
from hpc_rlhf.spec.stages import Data, EvalSpec, PpoSpec, kind_of
from hpc_rlhf.spec.training import StageSpec, TrainingSpec

# Share of a GPU that CUDA, NCCL and gaps between tensors take.
RESERVE = 0.08


@dataclass(frozen=True)
class Memory:
    """What a stage holds on each GPU.

    Attributes:
        parameters: of each model, by its name.
        always: bytes by part of what is held from the beginning to the end.
        moments: bytes by part of what is added for a while, by what is done then.
        gpu: bytes of a GPU; None where the spec does not say.
    """

    parameters: dict[str, int]
    always: Parts
    moments: dict[str, Parts]
    gpu: int | None

    @property
    def fullest(self) -> str:
        """The moment at which most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """Bytes by part at that moment."""
        return {part: size for part, size in added(self.always, self.moments[self.fullest]).items() if size}

    @property
    def held(self) -> int:
        return sum(self.parts.values())

    @property
    def left(self) -> int | None:
        """Bytes left for CUDA, NCCL and gaps between tensors; below 0 where the tensors alone do not fit."""
        return None if self.gpu is None else self.gpu - self.held

    @property
    def fits(self) -> bool | None:
        """Whether that is enough."""
        return None if self.gpu is None else self.held <= self.gpu * (1 - RESERVE)


def stage_memory(spec: JobSpec, name: str) -> Memory:
    """What a stage holds on each of its GPUs.

    Raises:
        HpcRlhfError: a model's configuration is not here, or transformers cannot build it; or the batch does not come out
            even.
    """
    stage = spec.stage(name)
    gpu = None if stage.slurm.gpu is None else gpu_bytes(stage.slurm.gpu)
    try:
        batch = derive_batch(stage, name)
    except ValueError as error:
        raise HpcRlhfError(str(error), where=f"stages.{name}.global_batch") from error
    return _memory(stage, spec, name, batch, gpu)


def _lengths(spec: JobSpec) -> tuple[int, int]:
    return spec.data.max_prompt_tokens, spec.data.max_answer_tokens


@singledispatch
def _memory(stage: StageSpec, spec: JobSpec, name: str, batch: Batch, gpu: int | None) -> Memory:
    """Of a stage that trains one model, perhaps against a frozen reference; others are registered below."""
    kind, training, lengths = kind_of(name), as_trained(stage), _lengths(spec)
    sequences = batch.micro * (2 if kind.data is Data.PAIRS else 1)
    tokens = sequences * sum(lengths)
    if kind.makes == "reward model":
        model = architecture(spec.models, "reward")
        held = in_training(Pass(model, training, tokens, 0), batch, scored=True)
        return Memory({"reward": scored_parameters(model)}, held.always, held.moments, gpu)
    model = architecture(spec.models, "actor")
    answers_only = kind.data is Data.PAIRS or getattr(stage, "answer_only", False)
    predicted = sequences * lengths[1] if answers_only else tokens
    # With adapters only, the model with its adapters off is the reference.
    own_ref = "ref" in stage.strategies and training.lora is not None and training.lora.only
    work = Pass(model, training, tokens, predicted, summed=kind.data is not Data.PAIRS, alternating=own_ref)
    held = in_training(work, batch)
    always = dict(held.always)
    if "ref" in stage.strategies and not own_ref:
        always["ref"] = frozen(model, model.parameters, stage.strategies["ref"], training)
    return Memory({"actor": model.parameters}, always, held.moments, gpu)


def run_memory(spec: JobSpec) -> dict[str, Memory | HpcRlhfError]:
    """What each stage holds, or why that is not known."""
    found: dict[str, Memory | HpcRlhfError] = {}
    for name in spec.stage_names:
        try:
            found[name] = stage_memory(spec, name)
        except HpcRlhfError as error:
            found[name] = error
    return found


@_memory.register
def _ppo(stage: PpoSpec, spec: JobSpec, name: str, batch: Batch, gpu: int | None) -> Memory:
    actor, reward, lengths = (
        architecture(spec.models, "actor"),
        architecture(spec.models, "reward"),
        _lengths(spec),
    )
    tokens, answers = batch.micro * sum(lengths), batch.micro * lengths[1]
    # Where a rollout is one micro-batch, the pass that it is evaluated by is kept to learn from: stages/ppo_trainer.py.
    kept = batch.accumulation * stage.minibatches == 1 and not stage.dropout
    policy = in_training(Pass(actor, stage, tokens, answers, with_entropies=kept), batch)
    of_critic = stage.of_critic
    critic = in_training(Pass(reward, of_critic, tokens, 0), batch, scored=True)
    always = {
        **policy.always,
        "critic": sum(critic.always.values()),
        "ref": frozen(actor, actor.parameters, stage.strategies["ref"], stage),
        "reward": frozen(reward, scored_parameters(reward), stage.strategies["reward"], stage),
    }
    if stage.ema:
        always["EMA"] = moving_average(actor, stage)
    moments = dict(policy.moments)
    for moment, parts in critic.moments.items():
        moments[f"the critic's {moment}"] = parts
    if kept and not stage.slurm.gpus_per_node:  # on a CPU the critic's, too
        both = {"activations": critic.moments["passes"]["activations"]}
        moments["passes"] = added(moments["passes"], both)
    rollout = batch.micro * batch.accumulation * stage.minibatches
    moments["rollouts"] = _rollout(actor, stage, -(-rollout // stage.tensor_parallel), lengths, gpu)
    moments["scoring"] = _asked(actor, stage, tokens, answers)
    return Memory({"actor": actor.parameters, "critic": scored_parameters(reward)}, always, moments, gpu)


@_memory.register
def _evaluation(stage: EvalSpec, spec: JobSpec, name: str, batch: Batch, gpu: int | None) -> Memory:
    """One model after the other answers, and is asked for log-probabilities."""
    actor, lengths = architecture(spec.models, "actor"), _lengths(spec)
    always = {"weights": weights(actor.parameters, stage, stage.slurm.ranks)}
    tokens = batch.micro * sum(lengths)
    answers = -(-stage.prompts // stage.slurm.ranks)
    moments = {
        "rollouts": _rollout(actor, stage, answers, lengths, gpu),
        "scoring": _asked(actor, stage, tokens, tokens),
    }
    return Memory({"each model": actor.parameters}, always, moments, gpu)


def _asked(model: Architecture, stage: StageSpec, tokens: int, predicted: int) -> Parts:
    """What a pass takes that nothing is learnt from: a layer at a time, and a chunk of the logits."""
    item = ITEM[stage.precision]
    gathered = gathered_weights(model, model.parameters, item) if stage.zero == 3 else 0
    return {
        "activations": tokens * _layer(model, item),
        "logits": Pass(model, as_trained(stage), tokens, predicted, with_entropies=True).logits,
        "gathered weights": gathered,
    }


def _layer(model: Architecture, item: int) -> int:
    """Bytes of a token while it passes a layer that keeps nothing."""
    return 3 * item * model.hidden + max(12 * model.hidden, 3 * item * model.inner)


def _rollout(
    actor: Architecture, stage: StageSpec, answers: int, lengths: tuple[int, int], gpu: int | None
) -> Parts:
    """What lasts as long as a rollout: the actor gathered, keys and values; and the pass over the first prompts."""
    item, longest = ITEM[stage.precision], sum(lengths)
    ways, lora = (stage.tensor_parallel, stage.lora) if isinstance(stage, TrainingSpec) else (1, None)
    whole = 0
    if stage.zero == 3:
        whole = item * actor.parameters
    elif ways > 1 or lora is not None:  # what is not cut or adapted is shared with the actor in training
        whole = item * actor.inside
    row = item * actor.kv * longest
    rows = min(ROWS, answers)
    if gpu is not None:
        whole = min(whole, int(WEIGHTS_SHARE * gpu))
        rows = max(1, min(rows, int(CACHE_SHARE * gpu) // row))
    return {
        "gathered actor": whole,
        "KV cache": rows * row,
        "activations": rows * lengths[0] * _layer(actor, item),
        "logits": rows * actor.vocabulary * (item + 4),
    }
