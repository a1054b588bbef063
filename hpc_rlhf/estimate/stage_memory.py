"""Memory of a stage on each GPU: its models, and what passes, steps and rollouts add for a while."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate import model_memory, vllm
from hpc_rlhf.estimate.model_memory import ITEM, Parts, Pass, added, as_trained
from hpc_rlhf.estimate.parameters import Architecture, architecture, critic_body, judges
from hpc_rlhf.estimate.pipeline import shares
from hpc_rlhf.spec.batch import Batch, derive_batch
from hpc_rlhf.spec.gpus import gpu_bytes
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sizes import CACHE_SHARE, ROWS, WEIGHTS_SHARE
from hpc_rlhf.spec.stages import Data, EvalSpec, GrpoSpec, PpoSpec, kind_of
from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.spec.training import StageSpec, TrainingSpec

# Share of a GPU that CUDA, NCCL and fragmentation take.
RESERVE = 0.08


@dataclass(frozen=True)
class Memory:
    """The memory of a stage on each GPU.

    Attributes:
        parameters: parameters of each model, by name.
        always: bytes by part, from start to end.
        phases: bytes by part that are added for a while, by activity.
        gpu: bytes of a GPU; None if the spec does not name it.
    """

    parameters: dict[str, int]
    always: Parts
    phases: dict[str, Parts]
    gpu: int | None

    @property
    def fullest(self) -> str:
        """The activity at which the memory peaks."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> Parts:
        """Bytes by part at the peak."""
        return {part: size for part, size in added(self.always, self.phases[self.fullest]).items() if size}

    @property
    def held(self) -> int:
        return sum(self.parts.values())

    @property
    def left(self) -> int | None:
        """Bytes left for CUDA, NCCL and fragmentation; negative if the tensors alone do not fit."""
        return None if self.gpu is None else self.gpu - self.held

    @property
    def fits(self) -> bool | None:
        """Whether enough is left."""
        return None if self.gpu is None else self.held <= self.gpu * (1 - RESERVE)


def stage_memory(spec: JobSpec, name: str) -> Memory:
    """The memory of a stage on each of its GPUs.

    Raises:
        HpcRlhfError: a model's configuration is not here, or transformers cannot build it.
    """
    stage = spec.stage(name)
    gpu = None if stage.slurm.gpu is None else gpu_bytes(stage.slurm.gpu)
    return _memory(stage, spec, name, derive_batch(stage, name), gpu)


def _lengths(spec: JobSpec) -> tuple[int, int]:
    return spec.data.max_prompt_tokens, spec.data.max_answer_tokens


@singledispatch
def _memory(stage: StageSpec, spec: JobSpec, name: str, batch: Batch, gpu: int | None) -> Memory:
    """A stage that trains one model, perhaps with a frozen reference. Other kinds are registered below."""
    kind, training, lengths = kind_of(name), as_trained(stage), _lengths(spec)
    sequences = batch.micro * (2 if kind.data is Data.PAIRS else 1)
    tokens = sequences * spec.longest(name)
    if kind.makes == "reward model":
        model = architecture(spec.models, "reward")
        trained = model_memory.in_training(Pass(model, training, tokens, 0), batch, scored=True)
        return Memory({"reward": model.scored}, trained.always, trained.phases, gpu)
    model = architecture(spec.models, "actor")
    texts = any(source.format == "text" for source in spec.data.sources)  # all of which is learned
    compared = kind.data in (Data.PAIRS, Data.LABELED)  # by the log-probabilities of whole responses
    answers_only = compared or (getattr(stage, "answer_only", False) and not texts)
    predicted = sequences * lengths[1] if answers_only else tokens
    # With adapters only, the model with its adapters off is the reference.
    own_ref = "ref" in stage.strategies and training.lora is not None and training.lora.only
    work = Pass(model, training, tokens, predicted, summed=not compared, alternating=own_ref)
    if stage.pipeline_stages > 1:
        return _fullest_stage(work, batch, gpu)
    trained = model_memory.in_training(work, batch)
    always = dict(trained.always)
    if "ref" in stage.strategies and not own_ref:
        always["ref"] = model_memory.frozen(model, model.parameters, stage.strategies["ref"], training)
    return Memory({"actor": model.parameters}, always, trained.phases, gpu)


def _fullest_stage(work: Pass, batch: Batch, gpu: int | None) -> Memory:
    """The memory of the pipeline stage that holds most."""
    model, stages = work.model, []
    for share in shares(model, work.stage.pipeline_stages, batch.accumulation):
        predicted = work.predicted if share.is_last else 0
        own = replace(work, model=share.model, predicted=predicted, in_flight=share.in_flight)
        trained = model_memory.in_training(own, batch)
        sizes = {"actor": model.parameters, "its fullest stage": share.model.parameters}
        stages.append(Memory(sizes, trained.always, trained.phases, gpu))
    return max(stages, key=lambda memory: memory.held)


def run_memory(spec: JobSpec) -> dict[str, Memory | HpcRlhfError]:
    """The memory of each stage, or why it is unknown."""
    memory: dict[str, Memory | HpcRlhfError] = {}
    for name in spec.stage_names:
        try:
            memory[name] = stage_memory(spec, name)
        except HpcRlhfError as error:
            memory[name] = error
    return memory


@_memory.register
def _policy(stage: PolicySpec, spec: JobSpec, name: str, batch: Batch, gpu: int | None) -> Memory:
    """The actor, what it is compared with, and the models of its rewards."""
    actor, lengths = architecture(spec.models, "actor"), _lengths(spec)
    tokens, responses = batch.micro * sum(lengths), batch.micro * lengths[1]
    # With adapters only, the actor with its adapters off is GRPO's reference.
    own_ref = isinstance(stage, GrpoSpec) and stage.kl_coef > 0 and "ref" not in stage.strategies
    scores = stage.scores_in_update(batch.accumulation * stage.minibatches)
    work = Pass(actor, stage, tokens, responses, with_entropies=scores, alternating=own_ref)
    policy = model_memory.in_training(work, batch)
    always = dict(policy.always)
    if "ref" in stage.strategies:
        always["ref"] = model_memory.frozen(actor, actor.parameters, stage.strategies["ref"], stage)
    if "reward" in stage.strategies:
        stored = stage.strategies["reward"]
        always["reward"] = sum(model_memory.frozen(each, each.scored, stored, stage) for each in judges(spec, stage))
    if stage.ema:
        always["EMA"] = model_memory.moving_average(actor, stage)
    rollout = batch.micro * batch.accumulation * stage.minibatches
    sharers = stage.tensor_parallel * stage.sequence_parallel
    engine, generating = _generating(actor, stage, name, -(-rollout // sharers), lengths, gpu)
    phases = {**policy.phases, "rollouts": generating, "scoring": _scoring(actor, stage, tokens, responses)}
    return Memory({"actor": actor.parameters}, always | engine, phases, gpu)


@_memory.register
def _ppo(stage: PpoSpec, spec: JobSpec, name: str, batch: Batch, gpu: int | None) -> Memory:
    """A policy, and its critic."""
    policy, body = _policy(stage, spec, name, batch, gpu), critic_body(spec, stage)
    tokens = batch.micro * sum(_lengths(spec))
    critic = model_memory.in_training(Pass(body, stage.of_critic, tokens, 0), batch, scored=True)
    phases = {**policy.phases, **{f"the critic's {phase}": parts for phase, parts in critic.phases.items()}}
    always = {**policy.always, "critic": sum(critic.always.values())}
    return Memory({**policy.parameters, "critic": body.scored}, always, phases, gpu)


@_memory.register
def _evaluation(stage: EvalSpec, spec: JobSpec, name: str, batch: Batch, gpu: int | None) -> Memory:
    """One model after another generates, and computes log-probabilities."""
    actor, lengths = architecture(spec.models, "actor"), _lengths(spec)
    always = {"weights": model_memory.weights(actor.parameters, stage, stage.slurm.ranks)}
    tokens = batch.micro * sum(lengths)
    responses = -(-stage.prompts // stage.slurm.ranks) * stage.samples
    engine, generating = _generating(actor, stage, name, responses, lengths, gpu)
    phases = {"rollouts": generating, "scoring": _scoring(actor, stage, tokens, tokens)}
    return Memory({"each model": actor.parameters}, always | engine, phases, gpu)


def _scoring(model: Architecture, stage: StageSpec, tokens: int, predicted: int) -> Parts:
    """A pass without gradients: activations of one layer, and a chunk of logits."""
    item = ITEM[stage.precision]
    gathered = model_memory.gathered_weights(model, model.parameters, item) if stage.zero == 3 else 0
    work = Pass(model, as_trained(stage), tokens, predicted, with_entropies=True)
    return {"activations": work.own_tokens * _layer(model, item), "logits": work.logits, "gathered weights": gathered}


def _layer(model: Architecture, item: int) -> int:
    """Bytes of a token in a layer that keeps nothing for a backward pass."""
    return 3 * item * model.hidden + max(12 * model.hidden, 3 * item * model.inner)


def _generating(
    actor: Architecture, stage: PolicySpec | EvalSpec, name: str, responses: int, lengths: tuple[int, int],
    gpu: int | None,
) -> tuple[Parts, Parts]:  # fmt: skip
    """What generates responses: what it holds always, and during a rollout."""
    if stage.rollout.engine == "in_process":
        return {}, _rollout(actor, stage, responses, lengths, gpu)
    served = vllm.Served(actor, ITEM[stage.precision], stage.rollout, gpu, f"stages.{name}.rollout")
    kept = {"vLLM's weights": int(served.weights), "vLLM's KV cache": int(served.cache(sum(lengths)) or 0)}
    return kept if stage.rollout.placement == "colocated" else {}, {
        "gathered weights": served.item * actor.largest if stage.zero == 3 else 0
    }


def _rollout(actor: Architecture, stage: StageSpec, responses: int, lengths: tuple[int, int], gpu: int | None) -> Parts:
    """A rollout: gathered weights and the KV cache, and the pass over the first prompts."""
    item, longest = ITEM[stage.precision], sum(lengths)
    ways, lora = (stage.tensor_parallel, stage.lora) if isinstance(stage, TrainingSpec) else (1, None)
    whole = 0
    if stage.zero == 3:
        whole = item * actor.parameters
    elif ways > 1 or lora is not None:  # other weights are shared with the actor in training
        whole = item * actor.inside
    row = item * actor.kv * longest
    rows = min(ROWS, responses)
    if gpu is not None:
        whole = min(whole, int(WEIGHTS_SHARE * gpu))
        rows = max(1, min(rows, int(CACHE_SHARE * gpu) // row))
    return {
        "gathered actor": whole,
        "KV cache": rows * row,
        "activations": rows * lengths[0] * _layer(actor, item),
        "logits": rows * actor.vocabulary * (item + 4),
    }
