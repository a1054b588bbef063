"""Memory of one model on one GPU, frozen or in training, and of its forward and backward passes."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.estimate.parameters import Architecture
from hpc_rlhf.spec.batch import Batch
from hpc_rlhf.spec.sizes import ALIGNED, BUCKET, LIVE, MLP_TOKENS, head_rows
from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.spec.training import LoraSpec, StageSpec, TrainingSpec

# Bytes of a number.
ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
# Without ZeRO, DeepSpeed reduces float32 gradients in buffers of this many numbers.
_FP32_BUCKET = 500_000_000

Parts = dict[str, int]


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one model over one micro-batch.

    Attributes:
        tokens: tokens of the micro-batch, of which a rank has a share under sequence parallelism.
        predicted: tokens whose log-probabilities are computed; 0 for a model without an output head.
        summed: only the sum of the log-probabilities is computed, together with its gradients.
        with_entropies: the entropies of the distributions are computed too.
        alternating: passes with and without adapters alternate, so ZeRO 3 gathers no weights ahead.
        in_flight: micro-batches whose activations are kept at a time; more than one in a pipeline.
    """

    model: Architecture
    stage: TrainingSpec
    tokens: int
    predicted: int
    summed: bool = False
    with_entropies: bool = False
    alternating: bool = False
    in_flight: int = 1

    @property
    def item(self) -> int:
        return ITEM[self.stage.precision]

    @property
    def own_tokens(self) -> int:
        """Tokens on each rank."""
        return -(-self.tokens // self.stage.sequence_parallel)

    @property
    def on_cpu(self) -> bool:
        return not self.stage.slurm.gpus_per_node

    @property
    def activations(self) -> int:
        """Bytes kept for the backward pass."""
        model, item, tokens = self.model, self.item, _aligned(self.own_tokens)
        layers = self._share(model.kept[item])
        if self.stage.lora is not None:
            layers += (
                item
                * self.stage.lora.rank
                * sum(each.count if each.passed is None else each.passed for each in model.adapted(self.stage.lora))
            )
        ends = 2 * item * model.hidden  # embeddings, and the input of the head
        if self.stage.pipeline_stages > 1:
            ends = 3 * item * model.hidden  # what a stage gets, a copy of it, and what it passes on
        if self._mlp_tokens < tokens:
            layers -= self._share(model.kept_in_mlps[item])
        again = 0.0
        if self.stage.activation_checkpointing:
            layers, again = model.layers * item * model.hidden, layers / model.layers
        return int(tokens * ((layers + ends) * self.in_flight + again))

    @property
    def backward(self) -> int:
        """Bytes of the gradients inside a layer: of a norm, in float32, or of the MLP, which a chunked one keeps beside
        the activations that it has computed again."""
        model, tokens = self.model, _aligned(self.own_tokens)
        in_mlp = 3 * self.item * model.inner / self.stage.tensor_parallel
        if self._mlp_tokens < tokens:
            in_mlp += self._share(model.kept_in_mlps[self.item]) / model.layers
        return max(20 * model.hidden * tokens, int(in_mlp * self._mlp_tokens))

    @property
    def _mlp_tokens(self) -> int:
        """Tokens that an MLP takes at a time."""
        tokens = _aligned(self.own_tokens)
        return min(tokens, MLP_TOKENS) if self.stage.chunked_mlp and self.model.chunked else tokens

    def _share(self, kept: tuple[float, float]) -> float:
        """This rank's bytes, of those that are whole on all ranks and those that tensor parallelism shards."""
        whole, sharded = kept
        return whole + sharded / self.stage.tensor_parallel

    @property
    def logits(self) -> int:
        """Peak bytes of the output head: one chunk of logits, and the gradients."""
        if not self.predicted:
            return 0
        model, item, n = self.model, self.item, _aligned(min(self.predicted, self.own_tokens))
        size, wide = model.vocabulary // model.head_ways(self.stage.tensor_parallel), 4 if self.on_cpu else item
        chunk = min(n, head_rows("cpu" if self.on_cpu else "cuda", size))
        head = size * model.hidden
        trained = self.stage.lora is None or not self.stage.lora.only
        weight_copy = 4 * head if self.on_cpu and item == 2 else 0  # a CPU multiplies half precision as float32
        # A chunk's float32 logits, or their slopes, are also held in half precision.
        per_logit = 4 if item == 4 else 4 + item
        chunk_bytes = chunk * (size * per_logit + (item + wide) * model.hidden)
        gradients = n * model.hidden * item + (4 * head if trained else 0)
        if not self.on_cpu and item == 2 and trained:
            gradients += item * head  # each chunk's gradient of the weight, before it is added
        forward = weight_copy + chunk_bytes + gradients
        if self.with_entropies:
            forward = max(forward, weight_copy + chunk_bytes + 8 * chunk * size)
        # Gradients on their way out: scaled by the gradient of the sum, and in the precision of the weights.
        backward = gradients + n * model.hidden * item + (item * head if trained and item == 2 else 0)
        if self.summed:
            backward += 4 * head if trained else 0
        else:
            backward += weight_copy + n * model.hidden * item
        return max(forward, backward)


def _aligned(tokens: int) -> int:
    return -(-tokens // ALIGNED) * ALIGNED


def as_trained(stage: StageSpec) -> TrainingSpec:
    """A stage as one that trains. An evaluation has no adapters, and no ranks that share layers or sequences."""
    if isinstance(stage, TrainingSpec):
        return stage
    common = ("precision", "zero", "offload_params", "slurm")
    return TrainingSpec(**{name: getattr(stage, name) for name in common})


@dataclass(frozen=True)
class ModelMemory:
    """A model in training on one rank.

    Attributes:
        always: bytes by part, from start to end.
        phases: bytes by part of what is added during passes, while gradients are reduced (at the end of a
            pass, or before, when their buffer is full), and during optimizer steps.
    """

    always: Parts
    phases: dict[str, Parts]


def added(*all_: Parts) -> Parts:
    """The sums by part."""
    return {part: sum(each.get(part, 0) for each in all_) for part in {p: 0 for each in all_ for p in each}}


def _on_rank(model: Architecture, total: int, ways: int) -> int:
    """Parameters on one rank of a tensor-parallel group."""
    matrix = model.vocabulary * model.hidden
    # A whole model has embeddings and perhaps a head of its own; a pipeline stage may lack either.
    split_head = model.head_ways(ways) > 1
    split = bool(model.head and split_head) + (model.vocabulary % ways == 0 and (split_head or model.head > 0))
    divided = model.inside + min(split, (total - model.inside) // matrix) * matrix
    return total - divided + -(-divided // ways)


def in_training(work: Pass, batch: Batch, scored: bool = False) -> ModelMemory:
    """A model in training: its weights, gradients and optimizer, and what passes and steps add.

    Under ZeRO 3, DeepSpeed holds the gradient shards and the reduction buffer all the time.

    Args:
        work: a pass over a micro-batch.
        scored: it has a score head instead of an output head.
    """
    model, stage, item = work.model, work.stage, work.item
    ways, lora, zero = stage.tensor_parallel, stage.lora, stage.zero
    total = _on_rank(model, model.scored if scored else model.parameters, ways)
    ranks = stage.slurm.ranks // ways // stage.pipeline_stages
    adapters = -(-model.adapters(lora) // ways)
    trained = trained_parameters(total, adapters, lora, model.hidden if scored else 0)
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
    at_head = item * model.largest if zero == 3 and work.alternating else gathered
    accumulated = gradients if batch.accumulation > 1 and zero < 3 else 0
    complete = gradients if zero < 3 else 0
    buffers = bucket if zero in (1, 2) else 0
    passing = {"activations": work.activations, "gradients": accumulated, "buffers": buffers}
    phases = {
        "passes": {**passing, "logits": work.logits, "gathered weights": at_head},
        "backward passes": {**passing, "gradients inside a layer": work.backward, "gathered weights": gathered},
    }
    reducing = bucket if zero > 1 and ranks > 1 else 0  # a full bucket is reduced in a copy
    phases["reduction"] = {"gathered weights": gathered, "gradients": complete, "buffers": buffers + reducing}
    if zero > 1 and trained > BUCKET:
        # The first full buckets are reduced while most activations still exist.
        remaining = int(work.activations * (1 - BUCKET / trained))
        phases["first reduction"] = added(
            {"activations": remaining, "gathered weights": gathered},
            {"gradients": accumulated, "buffers": buffers + reducing},
        )
    phases["steps"] = _step(stage, trained, shard, item, complete, buffers if ranks == 1 else 0)
    return ModelMemory(always, phases)


def _step(stage: TrainingSpec, trained: int, shard: int, item: int, gradients: int, buffers: int) -> Parts:
    """What an optimizer step adds: flat gradients, and their float32 copy."""
    if stage.offload_optimizer:
        return {"gradients": gradients}
    wide = 4 if item == 2 else 0
    if not stage.zero:
        flat = wide * trained or item * min(trained, _FP32_BUCKET)
        return {"gradients": gradients, "gradients for the step": flat}
    return {"gradients for the step": (item + wide) * shard, "buffers": buffers}


def trained_parameters(total: int, adapters: int, lora: LoraSpec | None, score: int) -> int:
    """Parameters in training: the adapters, and all others or only those of a score head."""
    return adapters + (score if lora is not None and lora.only else total)


def weights(count: int, stage: StageSpec, ranks: int) -> int:
    """Bytes of weights from start to end: a shard of them under ZeRO 3."""
    if stage.zero != 3:
        return ITEM[stage.precision] * count
    return 0 if stage.offload_params else ITEM[stage.precision] * -(-count // ranks)


def gathered_weights(model: Architecture, count: int, item: int) -> int:
    """Bytes of the weights that ZeRO 3 gathers ahead in a pass, and of those in use."""
    return item * (min(count, LIVE) + model.largest)


def frozen(model: Architecture, count: int, stage: StageSpec, of: TrainingSpec) -> int:
    """Bytes of a frozen model: sharded under ZeRO 3 and tensor parallelism, whole otherwise."""
    ways = of.tensor_parallel
    return weights(_on_rank(model, count, ways), stage, of.slurm.ranks // ways)


def moving_average(actor: Architecture, stage: PolicySpec) -> int:
    """Bytes of a rank's share of the moving average of the actor's weights."""
    ways = stage.tensor_parallel
    count = _on_rank(actor, actor.parameters, ways)
    if stage.lora is not None and stage.lora.only:  # of adapters, the updates of whole weights are averaged
        count = -(-sum(each.inputs * each.outputs * each.count for each in actor.adapted(stage.lora)) // ways)
    return 4 * -(-count // (stage.slurm.ranks // ways))
