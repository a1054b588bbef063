"""Seconds that one model takes in a step on a stage's GPUs: passes, optimizer, communication, offload and decoding."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.model_memory import ITEM, as_trained, trained_parameters
from hpc_rlhf.estimate.parameters import Architecture
from hpc_rlhf.spec.gpus import GPUS
from hpc_rlhf.spec.sizes import MLP_TOKENS, ROWS, WEIGHTS_SHARE
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


@dataclass(frozen=True)
class Machine:
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
class TimedModel:
    """A model in a step: its parameters without adapters, those in training, and the bytes of each.

    Attributes:
        columns: see ``Architecture.columns``.
        attended: numbers per token that go in and out of attention, in all layers.
        attention: operations of attention per token in a forward pass.
        chunked: see ``Architecture.chunked``.
    """

    layers: int
    hidden: int
    columns: int
    attended: int
    attention: int
    chunked: int
    count: int
    trained: int
    item: int
    scheme: TrainingSpec


def machine_of(stage: StageSpec, name: str) -> Machine:
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
    return Machine(
        gpu.gib * 2**30, MFU * gpu.peak(stage.precision), 1e9 * DECODE_SHARE * gpu.bandwidth, min(inside, outside),
        stage.slurm.ranks, ways, here, sequence, exchange, stage.pipeline_stages,
    )  # fmt: skip


def timed_model(body: Architecture, stage: TrainingSpec, scored: bool, longest: int) -> TimedModel:
    count = body.scored if scored else body.parameters
    trained = trained_parameters(count, body.adapters(stage.lora), stage.lora, body.hidden if scored else 0)
    attended = 2 * body.layers * body.hidden + body.kv
    attention = body.attention(longest)
    return TimedModel(
        body.layers, body.hidden, body.columns, attended, attention, body.chunked, count, trained,
        ITEM[stage.precision], stage,
    )  # fmt: skip


def _pass(model: TimedModel, flops: int, reads: int, tokens: int, machine: Machine) -> float:
    """Seconds of a rank to pass its share of ``tokens`` through a model, with ``flops`` operations per token.

    Args:
        reads: times that the weights are read, and the layers' kernels launched.
    """
    read = reads * model.item * model.count / machine.bandwidth
    work = (tokens / machine.sequence * flops / machine.flops + read) / machine.parts
    return max(work, reads * model.layers * _LAUNCHES / machine.stages)


def scoring(model: TimedModel, stored: StageSpec, tokens: int, machine: Machine) -> float:
    """Seconds of a pass without gradients, and of gathering the weights for it if they are sharded.

    Args:
        stored: how the model is stored, which may differ from how it is trained.
    """
    whole, fetched = model.item * model.count, 0.0
    if stored.zero == 3:
        fetched += whole * (machine.data_ranks - 1) / machine.data_ranks / machine.link
    if stored.offload_params:
        fetched += whole / machine.data_ranks / BUS
    return (
        _pass(model, 2 * model.count + model.attention, 1, tokens, machine)
        + fetched
        + _exchanged(model, tokens, machine, model.layers * 2 + 1)
    )


def _exchanged(model: TimedModel, tokens: int, machine: Machine, sums: int) -> float:
    """Seconds in which ranks exchange activations in a forward pass, or their gradients in a backward pass.

    Those that share ``tokens`` exchange them for heads, and back. Those that share layers all-reduce hidden states
    ``sums`` times, each of which costs twice its bytes: the outputs of attention, MLP and embeddings, or the gradients
    of the inputs of each layer whose outputs are split, and of the head.
    """
    own = tokens / machine.sequence * model.item
    heads = own * model.attended / machine.ways * (machine.sequence - 1) / machine.sequence
    summed = 2 * own * sums / machine.stages * model.hidden * (machine.ways - 1) / machine.ways
    return (heads + summed) / machine.exchange


def step(model: TimedModel, tokens: int, passes: int, machine: Machine) -> dict[str, float]:
    """Seconds of one optimizer step of a model, in which each pass has ``tokens`` tokens on each rank.

    A forward pass costs two operations per weight and token. So does each half of the backward pass: gradients of the
    inputs, and of the weights, which frozen weights do not need. Attention has no weights, and its backward pass costs
    twice its forward pass. Checkpointing adds a forward pass, and chunked MLPs one of theirs. A stage of a pipeline
    waits for one pass of each other stage while the pipeline fills and drains.
    """
    again = int(model.scheme.activation_checkpointing)
    lora = model.scheme.lora
    full = 2 if lora is not None and lora.only else 4
    flops = (2 + full + 2 * again) * model.count + (3 + again) * model.attention
    if model.scheme.chunked_mlp and tokens / machine.sequence > MLP_TOKENS:
        flops += 2 * model.chunked
    work = _pass(model, flops, 1 + full // 2 + again, tokens, machine)
    return {
        "training": passes * work,
        "bubble": (machine.stages - 1) * work,
        "optimizer": _optimizer(model, machine),
        "messages": _messages(model, passes, machine)
        + (1 + again) * _exchanged(model, passes * tokens, machine, model.layers * 2 + 1)
        + _exchanged(model, passes * tokens, machine, model.layers * model.columns + 1)
        + _passed_on(model, passes * tokens, machine),
        "offload": _offloaded(model, passes, machine),
    }


def _optimizer(model: TimedModel, machine: Machine) -> float:
    """Seconds of Adam on a GPU: on all weights of a rank, or on its shard under ZeRO."""
    if model.scheme.offload_optimizer:
        return 0.0
    trained = model.trained / machine.parts / (machine.data_ranks if model.scheme.zero else 1)
    return _ADAM_TRAFFIC * trained / machine.bandwidth


def _messages(model: TimedModel, passes: int, machine: Machine) -> float:
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


def _passed_on(model: TimedModel, tokens: int, machine: Machine) -> float:
    """Seconds in which a stage of a pipeline sends the hidden states of all tokens, and receives their gradients."""
    return 2 * model.item * tokens * model.hidden / machine.link if machine.stages > 1 else 0.0


def _offloaded(model: TimedModel, passes: int, machine: Machine) -> float:
    """Seconds in which a step waits for the bus and the CPU."""
    share, seconds = 1 / machine.data_ranks / machine.parts, 0.0
    if model.scheme.offload_optimizer:
        adam = _ADAM_TRAFFIC * machine.here / CPU_BANDWIDTH
        seconds += share * model.trained * (2 * model.item / BUS + adam)
    if model.scheme.offload_params:
        seconds += 2 * passes * share * model.item * model.count / BUS
    return seconds


def decoding(
    body: Architecture, actor: TimedModel, lengths: tuple[int, int], responses: int, machine: Machine, group: int = 1
) -> float:
    """Seconds in which a rank generates its responses of a rollout, ``group`` of them to each prompt.

    Each decoding step reads the weights and the KV cache once for all rows of the batch. A prompt passes through the
    model once. A sharded actor is gathered beforehand; the part that does not fit is gathered for every token.
    """
    prompt, answer = lengths
    rows = min(ROWS, responses)
    cache = rows * body.kv * actor.item * (prompt + answer / 2)
    work = max((actor.item * actor.count + cache) / machine.bandwidth, 2 * actor.count * rows / machine.flops)
    prompts = (2 * actor.count + body.attention(prompt)) * prompt * rows / group / machine.flops
    whole = actor.item * actor.count if actor.scheme.zero == 3 and machine.data_ranks > 1 else 0
    streamed = max(0.0, whole - WEIGHTS_SHARE * machine.memory)
    token = work + streamed / machine.link
    return -(-responses // rows) * (prompts + answer * token) + (whole - streamed) / machine.link
