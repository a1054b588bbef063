"""Seconds of one optimizer step, computed from arithmetic, memory traffic and communication."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate import vllm
from hpc_rlhf.estimate.model_memory import ITEM, as_trained, trained_parameters
from hpc_rlhf.estimate.parameters import Architecture, architecture, critic_body, judges
from hpc_rlhf.spec.batch import Batch, derive_batch
from hpc_rlhf.spec.gpus import GPUS
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sizes import ROWS, WEIGHTS_SHARE
from hpc_rlhf.spec.stages import Data, EvalSpec, GrpoSpec, PpoSpec, kind_of
from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.spec.training import StageSpec, TrainingSpec

# Share of a data sheet's FLOP/s that well-tuned training of dense models reaches: 0.3 to 0.55 in published
# runs (PaLM, arXiv 2204.02311, table 3).
MFU = 0.40
# Decoding reads all weights for each token; small kernels and sampling leave about half of the bandwidth.
DECODE_SHARE = 0.5
# One 200 Gbit/s adapter per GPU between nodes; 16 lanes of PCIe 4 to the CPU.
NETWORK, BUS = 25e9, 25e9
# Twelve channels of DDR5 or two sockets of DDR4, shared by the ranks of a node.
CPU_BANDWIDTH = 200e9
# Seconds in which Python launches the kernels of one layer's forward pass: about forty, of 5 to 8
# microseconds each. In a small pass the GPU waits for them.
_LAUNCHES = 0.25e-3
# Bytes that Adam reads and writes per weight: gradient, master weight and two moments.
_ADAM_TRAFFIC = 28
# The parts of a step's time in which the models learn.
_LEARNING = ("training", "optimizer", "messages", "offload")
_ASSUMPTIONS = (
    f"assumptions: every sample has the maximum length; {MFU:.0%} of a data sheet's FLOP/s, and "
    f"{DECODE_SHARE:.0%} of its memory bandwidth while decoding; {NETWORK / 1e9:.0f} GB/s per GPU between "
    "nodes and to the CPU; communication does not overlap computation; no time in the queue"
)


@dataclass(frozen=True)
class _Machine:
    """The GPUs of a stage. Rates are those that one GPU is assumed to reach.

    Attributes:
        link, exchange: bytes per second between all ranks, and between those that share sequences and layers.
        ways, sequence: ranks that share layers, and sequences.
        here: ranks of a node.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    ranks: int
    ways: int
    here: int
    sequence: int
    exchange: float
    stages: int

    @property
    def parts(self) -> int:
        """Ranks that a model is divided over, before ZeRO shards it."""
        return self.ways * self.stages

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same part of a model, before ZeRO shards it."""
        return self.ranks // self.parts


@dataclass(frozen=True)
class _Model:
    """A model in a step: its parameters without adapters, those in training, and the bytes of each.

    Attributes:
        attended: numbers per token that go in and out of attention, in all layers.
    """

    layers: int
    hidden: int
    attended: int
    count: int
    trained: int
    item: int
    scheme: TrainingSpec


def step_parts(spec: JobSpec, name: str) -> dict[str, float]:
    """The seconds that a stage's step or a whole evaluation takes, by part. What vLLM saves by generating on its own
    GPUs during training is a negative part.

    Raises:
        HpcRlhfError: the speed of slurm.gpu is unknown, or a model's configuration is not here.
    """
    stage = spec.stage(name)
    parts = _parts(stage, spec, name, derive_batch(stage, name), _machine(stage, name))
    if isinstance(stage, PolicySpec) and stage.rollout.overlap and stage.rollout.placement != "colocated":
        parts["overlap"] = -min(parts["decoding"], sum(parts[part] for part in _LEARNING))
    return {part: seconds for part, seconds in parts.items() if seconds}


def assumptions(spec: JobSpec) -> str:
    """What the times of a spec's stages are computed with."""
    stages = map(spec.stage, spec.stage_names)
    by_vllm = any(isinstance(stage, PolicySpec | EvalSpec) and stage.rollout.engine == "vllm" for stage in stages)
    return f"{_ASSUMPTIONS}; {vllm.ASSUMPTIONS}" if by_vllm else _ASSUMPTIONS


def _machine(stage: StageSpec, name: str) -> _Machine:
    gpu = GPUS.get(stage.slurm.gpu or "")
    if gpu is None or not stage.slurm.gpus_per_node:
        raise HpcRlhfError(
            "no time estimate without the name of the GPU",
            where=f"stages.{name}.slurm.gpu",
            hint=f"set slurm.gpu to one of {', '.join(GPUS)}",
        )
    # Collectives between nodes use all adapters of a node at once, and the links inside it to distribute the data.
    outside = NETWORK * stage.slurm.tasks_per_node if stage.slurm.nodes > 1 else float("inf")
    inside, here, training = gpu.link * 1e9, stage.slurm.tasks_per_node, as_trained(stage)
    ways, sequence = training.tensor_parallel, training.sequence_parallel
    exchange = inside if here % (ways * sequence) == 0 else NETWORK
    return _Machine(
        gpu.gib * 2**30, MFU * gpu.peak(stage.precision), 1e9 * DECODE_SHARE * gpu.bandwidth, min(inside, outside),
        stage.slurm.ranks, ways, here, sequence, exchange, stage.pipeline_stages,
    )  # fmt: skip


@singledispatch
def _parts(stage: StageSpec, spec: JobSpec, name: str, batch: Batch, machine: _Machine) -> dict[str, float]:
    """A stage that trains one model, perhaps with a frozen reference. Other kinds are registered below."""
    kind, training = kind_of(name), as_trained(stage)
    sequences = batch.micro * (2 if kind.data is Data.PAIRS else 1)
    tokens = sequences * spec.longest(name)
    scored = kind.makes == "reward model"
    model = _model(architecture(spec.models, "reward" if scored else "actor"), training, scored)
    parts = _step(model, tokens, batch.accumulation, machine)
    if "ref" in stage.strategies:
        own = training.lora is not None and training.lora.only
        stored = stage if own else stage.strategies["ref"]
        scored_tokens = [(stored, tokens)]
        if kind.data is Data.LABELED:  # also responses to other prompts, by both models
            scored_tokens += [(stored, tokens), (stage, tokens)]
        parts["scoring"] = batch.accumulation * sum(_scored(model, *each, machine) for each in scored_tokens)
    return parts


@_parts.register
def _ppo(stage: PpoSpec, spec: JobSpec, name: str, batch: Batch, machine: _Machine) -> dict[str, float]:
    """A rollout, and the optimizer steps of actor and critic on it."""
    actor = _model(architecture(spec.models, "actor"), stage, False)
    critic = _model(critic_body(spec, stage), stage.of_critic, True)
    beside = [(actor, stage.strategies["ref"]), (critic, stage.strategies["critic"])]
    parts = _policy(stage, spec, name, batch, machine, stage.ppo_epochs, beside)
    for part, seconds in _step(critic, _tokens(spec, batch), batch.accumulation, machine).items():
        parts[part] += stage.ppo_epochs * stage.minibatches * seconds
    return parts


@_parts.register
def _grpo(stage: GrpoSpec, spec: JobSpec, name: str, batch: Batch, machine: _Machine) -> dict[str, float]:
    """A rollout, and the optimizer steps of the actor on it. An actor with adapters alone is its own reference."""
    actor = _model(architecture(spec.models, "actor"), stage, False)
    beside = [(actor, stage.strategies.get("ref", stage))] if stage.kl_coef else []
    return _policy(stage, spec, name, batch, machine, stage.num_iterations, beside, stage.group_size)


def _policy(
    stage: PolicySpec, spec: JobSpec, name: str, batch: Batch, machine: _Machine, epochs: int,
    beside: list[tuple[_Model, StageSpec]], group: int = 1,
) -> dict[str, float]:  # fmt: skip
    """A rollout, its evaluation, and the actor's optimizer steps on it. Only rewards by a model take time.

    Args:
        epochs: passes over the experience.
        beside: what evaluates responses besides the actor and the reward models, each with how it is stored.
        group: responses to each prompt.
    """
    body = architecture(spec.models, "actor")
    actor, tokens, passes = _model(body, stage, False), _tokens(spec, batch), batch.accumulation * stage.minibatches
    step = _step(actor, tokens, batch.accumulation, machine)
    parts = {part: epochs * stage.minibatches * seconds for part, seconds in step.items()}
    scorers = beside if stage.scores_in_update(passes) else [(actor, stage), *beside]
    if "reward" in stage.strategies:
        scorers += [(_model(each, stage, True), stage.strategies["reward"]) for each in judges(spec, stage)]
    parts["scoring"] = passes * sum(_scored(model, stored, tokens, machine) for model, stored in scorers)
    responses = -(-batch.micro * passes // (machine.ways * machine.sequence))
    return parts | _generating(stage, spec, name, actor, responses, machine, group)


def _generating(
    stage: PolicySpec | EvalSpec, spec: JobSpec, name: str, actor: _Model, responses: int, machine: _Machine,
    group: int = 1,
) -> dict[str, float]:  # fmt: skip
    """A rollout of ``responses`` responses on each rank, ``group`` of them to each prompt."""
    body = architecture(spec.models, "actor")
    lengths = spec.data.max_prompt_tokens, spec.data.max_answer_tokens
    if stage.rollout.engine == "in_process":
        return {"decoding": _decoding(body, actor, lengths, responses, machine, group)}
    served = vllm.Served(body, actor.item, stage.rollout, machine.memory, f"stages.{name}.rollout")
    lacking = (machine.data_ranks - 1) / machine.data_ranks if actor.scheme.zero == 3 else 0.0
    bandwidth = machine.bandwidth / DECODE_SHARE
    servers = stage.rollout.servers(stage.slurm) * (stage.rollout.own_nodes or stage.slurm.nodes)
    return {
        "decoding": served.decoding(lengths, -(-responses * machine.ranks // servers), group, machine.flops, bandwidth),
        "new weights": served.syncing(lacking, machine.link, BUS),
    }


def _tokens(spec: JobSpec, batch: Batch) -> int:
    """Tokens of a micro-batch of prompts with one response each."""
    return batch.micro * (spec.data.max_prompt_tokens + spec.data.max_answer_tokens)


@_parts.register
def _evaluation(stage: EvalSpec, spec: JobSpec, name: str, batch: Batch, machine: _Machine) -> dict[str, float]:
    """Every policy responds to the prompts and computes likelihoods, and the reward model scores.

    Loading is not included. A rank passes its prompts through the models one micro-batch at a time.
    """
    body, like = architecture(spec.models, "actor"), as_trained(stage)
    model = _model(body, like, False)
    prompt, answer = spec.data.max_prompt_tokens, spec.data.max_answer_tokens
    responses = -(-stage.prompts // machine.ranks)
    passes = -(-responses // batch.micro)
    # The policies, and the model before training.
    models = len(spec.policies) + bool(spec.policies)
    # Each model scores the data's responses and its own, and their common reference scores all of them; pairs
    # are scored by the policy that was trained on them and by the one it started from.
    by_pairs = any(kind_of(each).makes_policy and kind_of(each).data is Data.PAIRS for each in spec.trained)
    passes_each = 3 * models + (4 if by_pairs else 0)
    tokens = batch.micro * (prompt + answer)
    scoring = passes_each * passes * _scored(model, stage, tokens, machine)
    if spec.judge is not None or spec.finished_reward is not None:
        judge = _model(architecture(spec.models, "reward"), like, True)
        scoring += (models + 3) * passes * _scored(judge, stage, tokens, machine)
    generating = _generating(stage, spec, name, model, responses * stage.samples, machine)
    return {"scoring": scoring, **{part: models * seconds for part, seconds in generating.items()}}


def _model(body: Architecture, stage: TrainingSpec, scored: bool) -> _Model:
    count = body.scored if scored else body.parameters
    trained = trained_parameters(count, body.adapters(stage.lora), stage.lora, body.hidden if scored else 0)
    attended = 2 * body.layers * body.hidden + body.kv
    return _Model(body.layers, body.hidden, attended, count, trained, ITEM[stage.precision], stage)


def _pass(model: _Model, flops: int, reads: int, tokens: int, machine: _Machine) -> float:
    """Seconds of a rank to pass its share of ``tokens`` through a model, with ``flops`` operations per token.

    Args:
        reads: times that the weights are read, and the layers' kernels launched.
    """
    read = reads * model.item * model.count / machine.bandwidth
    work = (tokens / machine.sequence * flops / machine.flops + read) / machine.parts
    return max(work, reads * model.layers * _LAUNCHES / machine.stages)


def _scored(model: _Model, stored: StageSpec, tokens: int, machine: _Machine) -> float:
    """Seconds of a pass without gradients, and of gathering the weights for it if they are sharded.

    Args:
        stored: how the model is stored, which may differ from how it is trained.
    """
    whole, fetched = model.item * model.count, 0.0
    if stored.zero == 3:
        fetched += whole * (machine.data_ranks - 1) / machine.data_ranks / machine.link
    if stored.offload_params:
        fetched += whole / machine.data_ranks / BUS
    return _pass(model, 2 * model.count, 1, tokens, machine) + fetched + _exchanged(model, tokens, machine)


def _exchanged(model: _Model, tokens: int, machine: _Machine) -> float:
    """Seconds in which ranks exchange activations in a forward pass.

    Those that share ``tokens`` exchange them for heads, and back. Those that share layers all-reduce the outputs of
    attention and MLP, each of which costs twice its bytes.
    """
    own = tokens / machine.sequence * model.item
    heads = own * model.attended / machine.ways * (machine.sequence - 1) / machine.sequence
    outputs = 4 * own * model.layers / machine.stages * model.hidden * (machine.ways - 1) / machine.ways
    return (heads + outputs) / machine.exchange


def _step(model: _Model, tokens: int, passes: int, machine: _Machine) -> dict[str, float]:
    """Seconds of one optimizer step of a model, in which each pass has ``tokens`` tokens on each rank.

    A forward pass costs two operations per weight and token. So does each half of the backward pass: gradients of the
    inputs, and of the weights, which frozen weights do not need. Checkpointing adds a forward pass. A stage of a
    pipeline waits for one pass of each other stage while the pipeline fills and drains.
    """
    again = int(model.scheme.activation_checkpointing)
    lora = model.scheme.lora
    full = 2 if lora is not None and lora.only else 4
    work = _pass(model, (2 + full + 2 * again) * model.count, 1 + full // 2 + again, tokens, machine)
    return {
        "training": passes * work,
        "bubble": (machine.stages - 1) * work,
        "optimizer": _optimizer(model, machine),
        "messages": _messages(model, passes, machine)
        + (2 + again) * _exchanged(model, passes * tokens, machine)
        + _passed_on(model, passes * tokens, machine),
        "offload": _offloaded(model, passes, machine),
    }


def _optimizer(model: _Model, machine: _Machine) -> float:
    """Seconds of Adam on a GPU: on all weights of a rank, or on its shard under ZeRO."""
    if model.scheme.offload_optimizer:
        return 0.0
    trained = model.trained / machine.parts / (machine.data_ranks if model.scheme.zero else 1)
    return _ADAM_TRAFFIC * trained / machine.bandwidth


def _messages(model: _Model, passes: int, machine: _Machine) -> float:
    """Seconds in which a rank communicates gradients and weights in a step.

    ZeRO 0 all-reduces gradients once per step, which costs twice their bytes; ZeRO 1 also gathers the new weights. ZeRO
    2 reduces gradients in every pass. ZeRO 3 reduce-scatters gradients and gathers all weights twice in every pass.
    """
    ranks, item, zero = machine.data_ranks, model.item, model.scheme.zero
    if ranks == 1:
        return 0.0
    trained, count = model.trained / machine.parts, model.count / machine.parts
    volume = {
        0: 2 * item * trained / (30 if model.scheme.optimizer == "onebit-adam" else 1),
        1: 3 * item * trained,
        2: (2 * passes + 1) * item * trained,
        3: passes * item * (trained + 2 * count),
    }[zero]
    return volume * (ranks - 1) / ranks / machine.link


def _passed_on(model: _Model, tokens: int, machine: _Machine) -> float:
    """Seconds in which a stage of a pipeline sends the hidden states of all tokens, and receives their gradients."""
    return 2 * model.item * tokens * model.hidden / machine.link if machine.stages > 1 else 0.0


def _offloaded(model: _Model, passes: int, machine: _Machine) -> float:
    """Seconds in which a step waits for the bus and the CPU."""
    share, seconds = 1 / machine.data_ranks / machine.parts, 0.0
    if model.scheme.offload_optimizer:
        adam = _ADAM_TRAFFIC * machine.here / CPU_BANDWIDTH
        seconds += share * model.trained * (2 * model.item / BUS + adam)
    if model.scheme.offload_params:
        seconds += 2 * passes * share * model.item * model.count / BUS
    return seconds


def _decoding(
    body: Architecture, actor: _Model, lengths: tuple[int, int], responses: int, machine: _Machine, group: int = 1
) -> float:
    """Seconds in which a rank generates its responses of a rollout, ``group`` of them to each prompt.

    Each decoding step reads the weights and the KV cache once for all rows of the batch. A prompt passes through the
    model once. A sharded actor is gathered beforehand; the part that does not fit is gathered for every token.
    """
    prompt, answer = lengths
    rows = min(ROWS, responses)
    cache = rows * body.kv * actor.item * (prompt + answer / 2)
    work = max((actor.item * actor.count + cache) / machine.bandwidth, 2 * actor.count * rows / machine.flops)
    prompts = 2 * actor.count * prompt * rows / group / machine.flops
    whole = actor.item * actor.count if actor.scheme.zero == 3 and machine.data_ranks > 1 else 0
    streamed = max(0.0, whole - WEIGHTS_SHARE * machine.memory)
    token = work + streamed / machine.link
    return -(-responses // rows) * (prompts + answer * token) + (whole - streamed) / machine.link
