"""Seconds of one optimizer step, computed from arithmetic, memory traffic and communication."""

from __future__ import annotations

from functools import singledispatch

from hpc_rlhf.estimate import model_time, vllm
from hpc_rlhf.estimate.model_memory import as_trained
from hpc_rlhf.estimate.model_time import BUS, DECODE_SHARE, MFU, NETWORK, Machine, TimedModel, timed_model
from hpc_rlhf.estimate.parameters import architecture, critic_body, judges
from hpc_rlhf.spec.batch import Batch, derive_batch
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.stages import Data, EvalSpec, GrpoSpec, PpoSpec, kind_of
from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.spec.training import StageSpec

# The parts of a step's time in which the models learn.
_LEARNING = ("training", "optimizer", "messages", "offload")
_ASSUMPTIONS = (
    f"assumptions: every sample has the maximum length; {MFU:.0%} of a data sheet's FLOP/s, and "
    f"{DECODE_SHARE:.0%} of its memory bandwidth while decoding; {NETWORK / 1e9:.0f} GB/s per GPU between "
    "nodes and to the CPU; communication does not overlap computation; no time in the queue"
)


def step_parts(spec: JobSpec, name: str) -> dict[str, float]:
    """The seconds that a stage's step or a whole evaluation takes, by part. What vLLM saves by generating on its own
    GPUs during training is a negative part.

    Raises:
        HpcRlhfError: the speed of slurm.gpu is unknown, or a model's configuration is not here.
    """
    stage = spec.stage(name)
    parts = _parts(stage, spec, name, derive_batch(stage, name), model_time.machine_of(stage, name))
    if isinstance(stage, PolicySpec) and stage.rollout.overlap and stage.rollout.placement != "colocated":
        parts["overlap"] = -min(parts["decoding"], sum(parts[part] for part in _LEARNING))
    return {part: seconds for part, seconds in parts.items() if seconds}


def assumptions(spec: JobSpec) -> str:
    """What the times of a spec's stages are computed with."""
    stages = map(spec.stage, spec.stage_names)
    by_vllm = any(isinstance(stage, PolicySpec | EvalSpec) and stage.rollout.engine == "vllm" for stage in stages)
    return f"{_ASSUMPTIONS}; {vllm.ASSUMPTIONS}" if by_vllm else _ASSUMPTIONS


@singledispatch
def _parts(stage: StageSpec, spec: JobSpec, name: str, batch: Batch, machine: Machine) -> dict[str, float]:
    """A stage that trains one model, perhaps with a frozen reference. Other kinds are registered below."""
    kind, training = kind_of(name), as_trained(stage)
    sequences = batch.micro * (2 if kind.data is Data.PAIRS else 1)
    longest = spec.longest(name)
    tokens = sequences * longest
    scored = kind.makes == "reward model"
    model = timed_model(architecture(spec.models, "reward" if scored else "actor"), training, scored, longest)
    parts = model_time.step(model, tokens, batch.accumulation, machine)
    if "ref" in stage.strategies:
        own = training.lora is not None and training.lora.only
        stored = stage if own else stage.strategies["ref"]
        scored_tokens = [(stored, tokens)]
        if kind.data is Data.LABELED:  # also responses to other prompts, by both models
            scored_tokens += [(stored, tokens), (stage, tokens)]
        parts["scoring"] = batch.accumulation * sum(model_time.scoring(model, *each, machine) for each in scored_tokens)
    return parts


@_parts.register
def _ppo(stage: PpoSpec, spec: JobSpec, name: str, batch: Batch, machine: Machine) -> dict[str, float]:
    """A rollout, and the optimizer steps of actor and critic on it."""
    actor = timed_model(architecture(spec.models, "actor"), stage, False, spec.longest(name))
    critic = timed_model(critic_body(spec, stage), stage.of_critic, True, spec.longest(name))
    beside = [(actor, stage.strategies["ref"]), (critic, stage.strategies["critic"])]
    parts = _policy(stage, spec, name, batch, machine, stage.ppo_epochs, beside)
    for part, seconds in model_time.step(critic, batch.micro * spec.longest(name), batch.accumulation, machine).items():
        parts[part] += stage.ppo_epochs * stage.minibatches * seconds
    return parts


@_parts.register
def _grpo(stage: GrpoSpec, spec: JobSpec, name: str, batch: Batch, machine: Machine) -> dict[str, float]:
    """A rollout, and the optimizer steps of the actor on it. An actor with adapters alone is its own reference."""
    actor = timed_model(architecture(spec.models, "actor"), stage, False, spec.longest(name))
    beside = [(actor, stage.strategies.get("ref", stage))] if stage.kl_coef else []
    return _policy(stage, spec, name, batch, machine, stage.num_iterations, beside, stage.group_size)


def _policy(
    stage: PolicySpec, spec: JobSpec, name: str, batch: Batch, machine: Machine, epochs: int,
    beside: list[tuple[TimedModel, StageSpec]], group: int = 1,
) -> dict[str, float]:  # fmt: skip
    """A rollout, its evaluation, and the actor's optimizer steps on it. Only rewards by a model take time.

    Args:
        epochs: passes over the experience.
        beside: what evaluates responses besides the actor and the reward models, each with how it is stored.
        group: responses to each prompt.
    """
    body = architecture(spec.models, "actor")
    longest = spec.longest(name)
    actor, tokens = timed_model(body, stage, False, longest), batch.micro * longest
    passes = batch.accumulation * stage.minibatches
    step = model_time.step(actor, tokens, batch.accumulation, machine)
    parts = {part: epochs * stage.minibatches * seconds for part, seconds in step.items()}
    scorers = beside if stage.scores_in_update(passes) else [(actor, stage), *beside]
    if "reward" in stage.strategies:
        judged_by = [timed_model(each, stage, True, longest) for each in judges(spec, stage)]
        scorers += [(model, stage.strategies["reward"]) for model in judged_by]
    parts["scoring"] = passes * sum(model_time.scoring(model, stored, tokens, machine) for model, stored in scorers)
    responses = -(-batch.micro * passes // (machine.ways * machine.sequence))
    return parts | _generating(stage, spec, name, actor, responses, machine, group)


def _generating(
    stage: PolicySpec | EvalSpec, spec: JobSpec, name: str, actor: TimedModel, responses: int, machine: Machine,
    group: int = 1,
) -> dict[str, float]:  # fmt: skip
    """A rollout of ``responses`` responses on each rank, ``group`` of them to each prompt."""
    body = architecture(spec.models, "actor")
    lengths = spec.data.max_prompt_tokens, spec.data.max_answer_tokens
    if stage.rollout.engine == "in_process":
        return {"decoding": model_time.decoding(body, actor, lengths, responses, machine, group)}
    served = vllm.Served(body, actor.item, stage.rollout, machine.memory, f"stages.{name}.rollout")
    lacking = (machine.data_ranks - 1) / machine.data_ranks if actor.scheme.zero == 3 else 0.0
    bandwidth = machine.bandwidth / DECODE_SHARE
    servers = stage.rollout.servers(stage.slurm) * (stage.rollout.own_nodes or stage.slurm.nodes)
    return {
        "decoding": served.decoding(lengths, -(-responses * machine.ranks // servers), group, machine.flops, bandwidth),
        "new weights": served.syncing(lacking, machine.link, BUS),
    }


@_parts.register
def _evaluation(stage: EvalSpec, spec: JobSpec, name: str, batch: Batch, machine: Machine) -> dict[str, float]:
    """Every policy responds to the prompts and computes likelihoods, and the reward model scores.

    Loading is not included. A rank passes its prompts through the models one micro-batch at a time.
    """
    body, like = architecture(spec.models, "actor"), as_trained(stage)
    longest = spec.longest(name)
    model = timed_model(body, like, False, longest)
    responses = -(-stage.prompts // machine.ranks)
    passes = -(-responses // batch.micro)
    # The policies, and the model before training.
    models = len(spec.policies) + bool(spec.policies)
    # Each model scores the data's responses and its own, and their common reference scores all of them; pairs
    # are scored by the policy that was trained on them and by the one it started from.
    by_pairs = any(kind_of(each).makes_policy and kind_of(each).data is Data.PAIRS for each in spec.trained)
    passes_each = 3 * models + (4 if by_pairs else 0)
    tokens = batch.micro * longest
    scoring = passes_each * passes * model_time.scoring(model, stage, tokens, machine)
    if spec.judge is not None or spec.finished_reward is not None:
        judge = timed_model(architecture(spec.models, "reward"), like, True, longest)
        scoring += (models + 3) * passes * model_time.scoring(judge, stage, tokens, machine)
    generating = _generating(stage, spec, name, model, responses * stage.samples, machine)
    return {"scoring": scoring, **{part: models * seconds for part, seconds in generating.items()}}
