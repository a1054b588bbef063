"""Seconds of one optimizer step, from arithmetic, memory traffic and messages; nothing is run for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.activations import ITEM, as_trained
from hpc_rlhf.estimate.parameters import Architecture, architecture
from hpc_rlhf.spec.batch import Batch, derive_batch
from hpc_rlhf.spec.gpus import Gpu, gpu_names, named_gpu
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sizes import ROWS, WEIGHTS_SHARE
from hpc_rlhf.spec.stages import Data, EvalSpec, PpoSpec, kind_of
from hpc_rlhf.spec.training import StageSpec, TrainingSpec

# What well-tuned training of dense models reaches of a data sheet's arithmetic: published runs lie between 0.3 and
# 0.55 (PaLM, arXiv 2204.02311, table 3).
MFU = 0.40
# Decoding reads all weights for each token; small kernels and sampling leave about half of the bandwidth.
DECODE_SHARE = 0.5
# One adapter of 200 Gbit/s for each GPU between nodes; 16 lanes of PCIe 4 to the CPU.
NETWORK, BUS = 25e9, 25e9
# Twelve channels of DDR5 or two sockets of DDR4, which the ranks of a node share.
CPU_BANDWIDTH = 200e9
# Seconds in which Python launches the kernels of one layer, forward: some forty, each 5 to 8 microseconds. A GPU waits for
# them where a pass is small.
_LAUNCHES = 0.25e-3
# Bytes of memory that Adam reads and writes for a weight: gradient, master and two moments.
_ADAM_TRAFFIC = 28
ASSUMPTIONS = (
    f"assumed: every sample of its greatest length, {MFU:.0%} of a data sheet's FLOP/s, {DECODE_SHARE:.0%} of its memory "
    f"bandwidth while decoding, {NETWORK / 1e9:.0f} GB/s for each GPU between nodes and to the CPU, "
    "messages and work one after the other, no time in the queue"
)


@dataclass(frozen=True)
class _Machine:
    """The GPUs of a stage as one step finds them. Rates are those of one GPU, after the shares assumed."""

    memory: float
    flops: float
    bandwidth: float
    link: float
    ranks: int
    ways: int
    here: int

    @property
    def sharers(self) -> int:
        return self.ranks // self.ways


@dataclass(frozen=True)
class _Model:
    """A model in a step: its layers, all its parameters, those in training, and bytes of a number."""

    layers: int
    count: int
    learnt: int
    item: int
    scheme: TrainingSpec

    @property
    def frozen_inside(self) -> bool:
        """Whether gradients of the weights themselves are mostly left out."""
        return self.scheme.lora is not None and self.scheme.lora.only


def step_parts(spec: JobSpec, name: str) -> dict[str, float]:
    """Seconds of a step of a stage, or of a whole evaluation, by what takes them.

    Raises:
        HpcRlhfError: slurm.gpu names no GPU whose speed is known, a model's configuration is not here, or the batch does
            not come out even.
    """
    stage = spec.stage(name)
    machine = _machine(stage, name)
    try:
        batch = derive_batch(stage, name)
    except ValueError as error:
        raise HpcRlhfError(str(error), where=f"stages.{name}.global_batch") from error
    parts = _parts(stage, spec, name, batch, machine)
    return {part: seconds for part, seconds in parts.items() if seconds}


def _machine(stage: StageSpec, name: str) -> _Machine:
    gpu = named_gpu(stage.slurm.gpu)
    if gpu is None or not stage.slurm.gpus_per_node:
        raise HpcRlhfError(
            "the time is not known without the GPU's name",
            where=f"stages.{name}.slurm.gpu",
            hint=f"set slurm.gpu to one of {', '.join(gpu_names())}",
        )
    # Collectives between nodes use all adapters of a node at once, and its own links to spread what they bring.
    outside = NETWORK * stage.slurm.tasks_per_node if stage.slurm.nodes > 1 else float("inf")
    link = min(gpu.link * 1e9, outside)
    return _Machine(
        gpu.gib * 2**30, 1e12 * MFU * _peak(gpu, stage), 1e9 * DECODE_SHARE * gpu.bandwidth, link,
        stage.slurm.ranks, as_trained(stage).tensor_parallel, stage.slurm.tasks_per_node,
    )  # fmt: skip


def _peak(gpu: Gpu, stage: StageSpec) -> float:
    slow = stage.precision == "fp32" or (stage.precision == "bf16" and not gpu.bf16)
    return gpu.single if slow else gpu.half


@singledispatch
def _parts(stage: StageSpec, spec: JobSpec, name: str, batch: Batch, machine: _Machine) -> dict[str, float]:
    """A step of a stage that trains one model, perhaps against a frozen reference; others are registered below."""
    kind, training = kind_of(name), as_trained(stage)
    sequences = batch.micro * (2 if kind.data is Data.PAIRS else 1)
    tokens = sequences * (spec.data.max_prompt_tokens + spec.data.max_answer_tokens)
    scored = kind.makes == "reward model"
    model = _model(
        architecture(spec.models, "reward" if scored else "actor"),
        training,
        scored,
    )
    parts = _step(model, tokens, batch.accumulation, machine)
    if "ref" in stage.strategies:
        own = training.lora is not None and training.lora.only
        held = stage if own else stage.strategies["ref"]
        parts["scoring"] = batch.accumulation * _scored(model, held, tokens, machine)
    return parts


@_parts.register
def _ppo(stage: PpoSpec, spec: JobSpec, name: str, batch: Batch, machine: _Machine) -> dict[str, float]:
    """A rollout and the optimizer steps on it."""
    body = architecture(spec.models, "actor")
    actor = _model(body, stage, False)
    critic = _model(architecture(spec.models, "reward"), stage.of_critic, True)
    prompt, answer = spec.data.max_prompt_tokens, spec.data.max_answer_tokens
    tokens = batch.micro * (prompt + answer)
    parts: dict[str, float] = {}
    updates = stage.ppo_epochs * stage.minibatches
    for model in (actor, critic):
        for part, seconds in _step(model, tokens, batch.accumulation, machine).items():
            parts[part] = parts.get(part, 0.0) + updates * seconds
    passes = batch.accumulation * stage.minibatches
    # The actor and its reference are asked for log-probabilities, the critic and the reward model for values.
    asked = {"": actor, "ref": actor, "critic": critic, "reward": critic}
    parts["scoring"] = passes * sum(
        _scored(model, stage.strategies[role], tokens, machine) for role, model in asked.items()
    )
    answers = -(-batch.micro * passes // machine.ways)
    parts["decoding"] = _decoding(body, actor, (prompt, answer), answers, machine)
    return parts


@_parts.register
def _evaluation(
    stage: EvalSpec, spec: JobSpec, name: str, batch: Batch, machine: _Machine
) -> dict[str, float]:
    """Every model answers the prompts and is asked for likelihoods, and the reward model judges; loading is left out.

    A rank's share of the prompts is taken through the models a micro-batch at a time.
    """
    body, like = architecture(spec.models, "actor"), as_trained(stage)
    model = _model(body, like, False)
    prompt, answer = spec.data.max_prompt_tokens, spec.data.max_answer_tokens
    answers = -(-stage.prompts // machine.ranks)
    passes = -(-answers // batch.micro)
    # The policies, and the model from before training.
    models = len(spec.policies) + bool(spec.policies)
    # Each model by the data's answers and its own, and the one they are held against by all of theirs; pairs by a policy
    # that learned from them and by the one it started from.
    by_pairs = any(kind_of(each).makes_policy and kind_of(each).data is Data.PAIRS for each in spec.trained)
    asked = 3 * models + (4 if by_pairs else 0)
    tokens = batch.micro * (prompt + answer)
    scoring = asked * passes * _scored(model, stage, tokens, machine)
    if spec.judge is not None:
        judge = _model(architecture(spec.models, "reward"), like, True)
        scoring += (models + 3) * passes * _scored(judge, stage, tokens, machine)
    return {
        "scoring": scoring,
        "decoding": models * _decoding(body, model, (prompt, answer), answers, machine),
    }


def _model(body: Architecture, stage: TrainingSpec, scored: bool) -> _Model:
    count = body.body + body.hidden if scored else body.parameters
    adapters = 0 if stage.lora is None else body.adapters(stage.lora)
    only = stage.lora is not None and stage.lora.only
    learnt = adapters + (body.hidden if scored else 0) if only else count + adapters
    return _Model(body.layers, count, learnt, ITEM[stage.precision], stage)


def _pass(model: _Model, flops: int, reads: int, tokens: int, machine: _Machine) -> float:
    """Seconds in which a rank takes ``tokens`` through a model, at ``flops`` a token, with its weights read ``reads`` times.

    Each time the layers' kernels are launched, too.
    """
    read = reads * model.item * model.count / machine.bandwidth
    work = (tokens * flops / machine.flops + read) / machine.ways
    return max(work, reads * model.layers * _LAUNCHES)


def _scored(model: _Model, held: StageSpec, tokens: int, machine: _Machine) -> float:
    """Seconds of a pass that nothing is learnt from, with what is fetched for it where the weights are sharded.

    Args:
        held: how the model is held in memory, which may not be how it is trained.
    """
    whole, fetched = model.item * model.count, 0.0
    if held.zero == 3:
        fetched += whole * (machine.sharers - 1) / machine.sharers / machine.link
    if held.offload_params:
        fetched += whole / machine.sharers / BUS
    return _pass(model, 2 * model.count, 1, tokens, machine) + fetched


def _step(model: _Model, tokens: int, passes: int, machine: _Machine) -> dict[str, float]:
    """Seconds of one optimizer step of a model, whose every pass has ``tokens`` on each rank.

    A forward pass costs two operations a weight and token. So does each half of the backward pass, of which frozen
    weights need only the half that goes on to the layer before; checkpointing adds a forward pass.
    """
    again = int(model.scheme.activation_checkpointing)
    full = 4 if not model.frozen_inside else 2
    work = _pass(model, (2 + full + 2 * again) * model.count, 1 + full // 2 + again, tokens, machine)
    return {
        "training": passes * work,
        "optimizer": _optimizer(model, machine),
        "messages": _messages(model, passes, machine),
        "offload": _offloaded(model, passes, machine),
    }


def _optimizer(model: _Model, machine: _Machine) -> float:
    """Seconds of Adam on a GPU: on all weights of a rank, or under ZeRO on its share of them."""
    if model.scheme.offload_optimizer:
        return 0.0
    learnt = model.learnt / machine.ways / (machine.sharers if model.scheme.zero else 1)
    return _ADAM_TRAFFIC * learnt / machine.bandwidth


def _messages(model: _Model, passes: int, machine: _Machine) -> float:
    """Seconds in which a rank sends and gets a step's gradients and weights.

    Once a step: an all-reduce of gradients, which is twice their bytes, under ZeRO 0; and the new weights under ZeRO 1.
    ZeRO 2 does the former in every pass; ZeRO 3 scatters gradients, and gathers all weights twice, in every pass.
    """
    sharers, item, zero = machine.sharers, model.item, model.scheme.zero
    if sharers == 1:
        return 0.0
    learnt, count = model.learnt / machine.ways, model.count / machine.ways
    sent = {
        0: 2 * item * learnt / (30 if model.scheme.optimizer == "onebit-adam" else 1),
        1: 3 * item * learnt,
        2: (2 * passes + 1) * item * learnt,
        3: passes * item * (learnt + 2 * count),
    }[zero]
    return sent * (sharers - 1) / sharers / machine.link


def _offloaded(model: _Model, passes: int, machine: _Machine) -> float:
    """Seconds in which a step waits for the bus and the CPU."""
    share, seconds = 1 / machine.sharers / machine.ways, 0.0
    if model.scheme.offload_optimizer:
        adam = _ADAM_TRAFFIC * machine.here / CPU_BANDWIDTH
        seconds += share * model.learnt * (2 * model.item / BUS + adam)
    if model.scheme.offload_params:
        seconds += 2 * passes * share * model.item * model.count / BUS
    return seconds


def _decoding(
    body: Architecture, actor: _Model, lengths: tuple[int, int], answers: int, machine: _Machine
) -> float:
    """Seconds in which a rank makes its answers of a rollout.

    Each token reads the weights, and the keys and values so far, once for all answers that are made at a time. An actor
    that is sharded is gathered before; what is too large for that is gathered for every token.
    """
    prompt, answer = lengths
    rows = min(ROWS, answers)
    cache = rows * body.kv * actor.item * (prompt + answer / 2)
    work = max((actor.item * actor.count + cache) / machine.bandwidth, 2 * actor.count * rows / machine.flops)
    prompts = 2 * actor.count * prompt * rows / machine.flops
    whole = actor.item * actor.count if actor.scheme.zero == 3 and machine.sharers > 1 else 0
    streamed = max(0.0, whole - WEIGHTS_SHARE * machine.memory)
    token = work + streamed / machine.link
    return -(-answers // rows) * (prompts + answer * token) + (whole - streamed) / machine.link
