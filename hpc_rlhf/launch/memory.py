"""Bytes that a stage holds on each GPU: its models all the time, and what passes, steps and rollouts add for a while."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.architecture import Architecture, architecture
from hpc_rlhf.launch.passes import ITEM, Pass, as_trained
from hpc_rlhf.spec.batch import Batch, derive_batch
from hpc_rlhf.spec.gpus import gpu_bytes
from hpc_rlhf.spec.model import JobSpec
from hpc_rlhf.spec.stages import EvalSpec, PpoSpec
from hpc_rlhf.spec.training import LoraSpec, StageSpec, TrainingSpec

# Numbers in the buffer through which gradients are reduced, and of the weights that stand whole at a time under
# ZeRO 3: those of templates/ds_config.json.j2.
_BUCKET, _LIVE = 200_000_000, 30_000_000
# DeepSpeed averages float32 gradients without ZeRO in buffers of so many numbers.
_AVERAGED = 500_000_000
# As rollout/engine.py has them: answers made at a time, and the shares of a GPU that a rollout takes at most.
_ROWS, _WEIGHTS_SHARE, _CACHE_SHARE = 64, 0.5, 0.2
# Share of a GPU that CUDA, NCCL and gaps between tensors take.
RESERVE = 0.08

Parts = dict[str, int]


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
        return {part: size for part, size in _added(self.always, self.moments[self.fullest]).items() if size}

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


@dataclass(frozen=True)
class _Model:
    """A model in training on one rank."""

    always: Parts
    moments: dict[str, Parts]


def stage_memory(spec: JobSpec, name: str) -> Memory:
    """What a stage holds on each of its GPUs.

    Raises:
        HpcRlhfError: a model's configuration is not here, or is not of a family that is counted; or the batch does not
            come out even.
    """
    stage = spec.stage(name)
    gpu = None if stage.slurm.gpu is None else gpu_bytes(stage.slurm.gpu)
    rewarding = spec.models.reward or spec.models.actor
    try:
        batch = derive_batch(stage, name)
    except ValueError as error:
        raise HpcRlhfError(str(error), where=f"stages.{name}.global_batch") from error
    lengths = (spec.data.max_prompt_tokens, spec.data.max_answer_tokens)
    if name == "reward":
        assert isinstance(stage, TrainingSpec)
        model = architecture(rewarding, "models.reward")
        trained = _trained(Pass(model, stage, 2 * batch.micro * sum(lengths), 0), batch, scored=True)
        return Memory({"reward": _scored(model)}, trained.always, trained.moments, gpu)
    actor = architecture(spec.models.actor, "models.actor")
    if isinstance(stage, EvalSpec):
        return _evaluation(actor, stage, batch, lengths, gpu)
    assert isinstance(stage, TrainingSpec)
    if isinstance(stage, PpoSpec):
        return _ppo(actor, architecture(rewarding, "models.reward"), stage, batch, lengths, gpu)
    paired = 1 + (name == "dpo")
    tokens = paired * batch.micro * sum(lengths)
    learnt = (
        paired * batch.micro * lengths[1] if paired == 2 or getattr(stage, "answer_only", False) else tokens
    )
    own_ref = name == "dpo" and stage.lora is not None and stage.lora.only
    work = Pass(actor, stage, tokens, learnt, summed=paired == 1, alternating=own_ref)
    trained = _trained(work, batch)
    always = dict(trained.always)
    if name == "dpo" and not own_ref:
        always["ref"] = _frozen(actor, actor.parameters, stage.strategies["ref"], stage)
    return Memory({"actor": actor.parameters}, always, trained.moments, gpu)


def run_memory(spec: JobSpec) -> dict[str, Memory | HpcRlhfError]:
    """What each stage holds, or why that is not known."""
    found: dict[str, Memory | HpcRlhfError] = {}
    for name in spec.stage_names:
        try:
            found[name] = stage_memory(spec, name)
        except HpcRlhfError as error:
            found[name] = error
    return found


def _ppo(
    actor: Architecture, reward: Architecture, stage: PpoSpec, batch: Batch, lengths: tuple[int, int], gpu: int | None
) -> Memory:  # fmt: skip
    tokens, answers = batch.micro * sum(lengths), batch.micro * lengths[1]
    # Where a rollout is one micro-batch, the pass that it is evaluated by is kept to learn from: stages/ppo_trainer.py.
    kept = batch.accumulation * stage.minibatches == 1 and not stage.dropout
    policy = _trained(Pass(actor, stage, tokens, answers, with_entropies=kept), batch)
    of_critic = stage.of_critic
    critic = _trained(Pass(reward, of_critic, tokens, 0), batch, scored=True)
    always = {
        **policy.always,
        "critic": sum(critic.always.values()),
        "ref": _frozen(actor, actor.parameters, stage.strategies["ref"], stage),
        "reward": _frozen(reward, _scored(reward), stage.strategies["reward"], stage),
    }
    if stage.ema:
        always["EMA"] = _averaged(actor, stage)
    moments = dict(policy.moments)
    for name, parts in critic.moments.items():
        moments[f"the critic's {name}"] = parts
    if kept and not stage.slurm.gpus_per_node:  # on a CPU the critic's, too
        both = {"activations": critic.moments["passes"]["activations"]}
        moments["passes"] = _added(moments["passes"], both)
    rollout = batch.micro * batch.accumulation * stage.minibatches
    moments["rollouts"] = _rollout(actor, stage, -(-rollout // stage.tensor_parallel), lengths, gpu)
    moments["scoring"] = _asked(actor, stage, tokens, answers)
    return Memory({"actor": actor.parameters, "critic": _scored(reward)}, always, moments, gpu)


def _evaluation(
    actor: Architecture, stage: EvalSpec, batch: Batch, lengths: tuple[int, int], gpu: int | None
) -> Memory:
    """One model after the other answers, and is asked for log-probabilities."""
    always = {"weights": _weights(actor.parameters, stage, stage.slurm.ranks)}
    tokens = batch.micro * sum(lengths)
    answers = -(-stage.prompts // stage.slurm.ranks)
    moments = {
        "rollouts": _rollout(actor, stage, answers, lengths, gpu),
        "scoring": _asked(actor, stage, tokens, tokens),
    }
    return Memory({"each model": actor.parameters}, always, moments, gpu)


def _added(*all_: Parts) -> Parts:
    return {part: sum(each.get(part, 0) for each in all_) for part in {p: 0 for each in all_ for p in each}}


def _scored(model: Architecture) -> int:
    """Parameters of a body with a score head."""
    return model.body + model.hidden


def _cut(model: Architecture, total: int, ways: int) -> int:
    """Parameters of which a rank has its own part, where layers are cut."""
    return total - model.inside + -(-model.inside // ways)


def _trained(work: Pass, batch: Batch, scored: bool = False) -> _Model:
    """A model in training: its weights, gradients and optimizer, and what passes and steps add.

    Under ZeRO 3, what the gradients are gathered in and their shards are there all the time, as DeepSpeed makes them.
    """
    model, stage, item = work.model, work.stage, work.item
    ways, lora, zero = stage.tensor_parallel, stage.lora, stage.zero
    total = _cut(model, _scored(model) if scored else model.parameters, ways)
    ranks = stage.slurm.ranks // ways
    adapters = 0 if lora is None else -(-model.adapters(lora) // ways)
    trained = _learnt(total, adapters, lora, model.hidden if scored else 0)
    shard = -(-trained // ranks)
    bucket = item * min(_BUCKET, trained) if zero else 0
    gradients = item * (trained if zero < 2 else shard)
    always = {"weights": _weights(total + adapters, stage, ranks), "optimizer": 0}
    if not stage.offload_optimizer:
        # Masters, where the weights are not float32 themselves, and two moments; 1-bit Adam adds what it has not sent.
        masters = 4 if item == 2 or zero else 0
        sent = 4 if stage.optimizer == "onebit-adam" else 0
        always["optimizer"] = (masters + 8 + sent) * (shard if zero else trained)
    elif zero < 3:
        gradients = 0 if zero == 2 else gradients  # they go to the CPU as they come
    if zero == 3:
        always |= {"gradients": 0 if stage.offload_optimizer else gradients, "buffers": bucket}
    gathered = _gathered(model, total + adapters, item) if zero == 3 else 0
    if zero == 3 and work.alternating:
        gathered = item * (min(total + adapters, _LIVE) + model.largest)
    waiting = gradients if batch.accumulation > 1 and zero < 3 else 0
    ended = gradients if zero < 3 else 0
    passing = {"activations": work.activations, "logits": work.logits, "gathered weights": gathered}
    held = bucket if zero in (1, 2) else 0
    moments = {"passes": {**passing, "gradients": waiting, "buffers": held}}
    sent_at_once = bucket if zero > 1 and ranks > 1 else 0  # what a full bucket is reduced in
    moments["reduction"] = {"gathered weights": gathered, "gradients": ended, "buffers": held + sent_at_once}
    if zero > 1 and trained > _BUCKET:
        # The first full buckets go while most activations are still there.
        still = int(work.activations * (1 - _BUCKET / trained))
        moments["first reduction"] = _added(
            {"activations": still, "gathered weights": gathered},
            {"gradients": waiting, "buffers": held + sent_at_once},
        )
    moments["steps"] = _step(stage, trained, shard, item, ended, held if ranks == 1 else 0)
    return _Model(always, moments)


def _step(stage: TrainingSpec, trained: int, shard: int, item: int, gradients: int, held: int) -> Parts:
    """What an optimizer step adds: gradients in a row, and as float32."""
    if stage.offload_optimizer:
        return {"gradients": gradients}
    wide = 4 if item == 2 else 0
    if not stage.zero:
        flat = wide * trained or item * min(trained, _AVERAGED)
        return {"gradients": gradients, "gradients for the step": flat}
    return {"gradients for the step": (item + wide) * shard, "buffers": held}


def _learnt(total: int, adapters: int, lora: LoraSpec | None, score: int) -> int:
    if lora is None:
        return total
    return adapters + (score if lora.only else total)


def _weights(count: int, stage: StageSpec, ranks: int) -> int:
    """Bytes of weights all the time: a share of them under ZeRO 3."""
    if stage.zero != 3:
        return ITEM[stage.precision] * count
    return 0 if stage.offload_params else ITEM[stage.precision] * -(-count // ranks)


def _gathered(model: Architecture, count: int, item: int) -> int:
    """Bytes of the weights that stand whole in a pass under ZeRO 3, with what they are gathered in."""
    return item * (min(count, _LIVE) + min(count, max(_LIVE, model.largest)))


def _frozen(model: Architecture, count: int, stage: StageSpec, of: TrainingSpec) -> int:
    """Bytes of a model that does not train: sharded under ZeRO 3 and cut under tensor parallelism, whole otherwise."""
    ways = of.tensor_parallel
    return _weights(_cut(model, count, ways), stage, of.slurm.ranks // ways)


def _averaged(actor: Architecture, stage: PpoSpec) -> int:
    """Bytes of a rank's share of the moving average."""
    ways = stage.tensor_parallel
    adapters = 0 if stage.lora is None else actor.adapters(stage.lora)
    averaged = _learnt(_cut(actor, actor.parameters, ways), -(-adapters // ways), stage.lora, 0)
    return 4 * -(-averaged // (stage.slurm.ranks // ways))


def _asked(model: Architecture, stage: StageSpec, tokens: int, predicted: int) -> Parts:
    """What a pass takes that nothing is learnt from: a layer at a time, and a chunk of the logits."""
    item = ITEM[stage.precision]
    gathered = _gathered(model, model.parameters, item) if stage.zero == 3 else 0
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
    rows = min(_ROWS, answers)
    if gpu is not None:
        whole = min(whole, int(_WEIGHTS_SHARE * gpu))
        rows = max(1, min(rows, int(_CACHE_SHARE * gpu) // row))
    return {
        "gathered actor": whole,
        "KV cache": rows * row,
        "activations": rows * lengths[0] * _layer(actor, item),
        "logits": rows * actor.vocabulary * (item + 4),
    }
