"""Memory of a forward and backward pass besides the models: activations and the output head's logits."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.estimate.parameters import Architecture
from hpc_rlhf.spec.sizes import ALIGNED, LOGITS
from hpc_rlhf.spec.training import StageSpec, TrainingSpec

# Bytes of a number.
ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Pass:
    """A pass of one model over one micro-batch.

    Attributes:
        model: its architecture.
        stage: how it is trained.
        tokens: tokens of the micro-batch.
        predicted: tokens whose log-probabilities are computed; 0 for a model without an output head.
        summed: only the sum of the log-probabilities is computed, together with its gradients.
        with_entropies: the entropies of the distributions are computed too.
        alternating: passes with and without adapters alternate, so ZeRO 3 keeps no weights for the next pass.
    """

    model: Architecture
    stage: TrainingSpec
    tokens: int
    predicted: int
    summed: bool = False
    with_entropies: bool = False
    alternating: bool = False

    @property
    def item(self) -> int:
        return ITEM[self.stage.precision]

    @property
    def on_cpu(self) -> bool:
        return not self.stage.slurm.gpus_per_node

    @property
    def activations(self) -> int:
        """Bytes kept for the backward pass, and what its first steps need beyond the memory of the logits."""
        model, item, tokens = self.model, self.item, _aligned(self.tokens)
        whole, sharded = model.kept[item]
        layers = whole + sharded / self.stage.tensor_parallel
        if self.stage.lora is not None:
            layers += item * self.stage.lora.rank * sum(each.count for each in model.adapted(self.stage.lora))
        ends = 2 * item * model.hidden  # embeddings, and the input of the head
        if self.stage.activation_checkpointing:
            layers = model.layers * item * model.hidden + layers / model.layers
        # Gradients inside a norm, in float32, or inside the MLP.
        backward = max(20 * model.hidden, 3 * item * model.inner // self.stage.tensor_parallel)
        return int(tokens * (layers + ends)) + max(0, tokens * backward - self.logits)

    @property
    def logits(self) -> int:
        """Peak bytes of the output head: one chunk of logits, and the gradients."""
        if not self.predicted:
            return 0
        model, item, n = self.model, self.item, _aligned(self.predicted)
        size, wide = model.vocabulary, 4 if self.on_cpu else item
        rows = max(1, LOGITS["cpu" if self.on_cpu else "cuda"] // size // ALIGNED) * ALIGNED
        chunk = min(n, rows)
        head = size * model.hidden
        trained = self.stage.lora is None or not self.stage.lora.only
        weight_copy = 4 * head if self.on_cpu and item == 2 else 0  # a CPU multiplies half precision as float32
        # A GPU holds the chunk in half precision, before and after its float32 logits.
        per_logit = 4 if item == 4 or self.on_cpu else 4 + item
        chunk_bytes = chunk * (size * per_logit + (item + wide) * model.hidden)
        gradients = n * model.hidden * wide + (4 * head if trained else 0)
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
            backward += weight_copy + n * model.hidden * wide
        return max(forward, backward)


def _aligned(tokens: int) -> int:
    return -(-tokens // ALIGNED) * ALIGNED


def as_trained(stage: StageSpec) -> TrainingSpec:
    """A stage as one that trains. An evaluation has neither adapters nor tensor parallelism."""
    if isinstance(stage, TrainingSpec):
        return stage
    common = ("precision", "zero", "offload_params", "slurm")
    return TrainingSpec(**{name: getattr(stage, name) for name in common})
