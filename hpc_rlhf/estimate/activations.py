"""Bytes that a pass over one micro-batch takes of a GPU besides the models: what its backward pass needs, and the head."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.estimate.parameters import Architecture
from hpc_rlhf.spec.sizes import ALIGNED, LOGITS
from hpc_rlhf.spec.training import StageSpec, TrainingSpec

ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Pass:
    """A pass of one model over one micro-batch.

    Attributes:
        model: its architecture.
        stage: how it is trained.
        tokens: of the micro-batch.
        predicted: tokens whose log-probabilities are taken; 0 where the model has no output head.
        summed: only their sum is, so that gradients are made along with it.
        with_entropies: the entropies of the distributions are taken, too.
        alternating: passes with and without adapters take turns, so that ZeRO 3 keeps no weights for the next one.
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
        """What is kept for the backward pass, and what its first steps take beyond the memory of the logits."""
        model, item, tokens = self.model, self.item, _aligned(self.tokens)
        whole, sharded = model.kept[item]
        layers = whole + sharded / self.stage.tensor_parallel
        if self.stage.lora is not None:
            layers += item * self.stage.lora.rank * sum(each.count for each in model.adapted(self.stage.lora))
        ends = 2 * item * model.hidden  # embeddings, and what the head is given
        if self.stage.activation_checkpointing:
            layers = model.layers * item * model.hidden + layers / model.layers
        # The gradients in a norm, in float32, or in the MLP.
        backward = max(20 * model.hidden, 3 * item * model.inner // self.stage.tensor_parallel)
        return int(tokens * (layers + ends)) + max(0, tokens * backward - self.logits)

    @property
    def logits(self) -> int:
        """What the output head takes: a chunk of the logits, and its gradients, at their most."""
        if not self.predicted:
            return 0
        model, item, n = self.model, self.item, _aligned(self.predicted)
        size, wide = model.vocabulary, 4 if self.on_cpu else item
        rows = max(1, LOGITS["cpu" if self.on_cpu else "cuda"] // size // ALIGNED) * ALIGNED
        chunk = min(n, rows)
        head = size * model.hidden
        trained = self.stage.lora is None or not self.stage.lora.only
        copied = 4 * head if self.on_cpu and item == 2 else 0  # a CPU multiplies half precision from float32
        # A GPU has the chunk in half precision before and after its float32 logits.
        one = 4 if item == 4 or self.on_cpu else 4 + item
        standing = chunk * (size * one + (item + wide) * model.hidden)
        made = n * model.hidden * wide + (4 * head if trained else 0)
        if not self.on_cpu and item == 2 and trained:
            made += item * head  # each chunk's gradient of the weight, before it is added
        forward = copied + standing + made
        if self.with_entropies:
            forward = max(forward, copied + standing + 8 * chunk * size)
        # The gradients as they are handed on: a sum's times its own, and in the weights' precision.
        handed = made + n * model.hidden * item + (item * head if trained and item == 2 else 0)
        if self.summed:
            handed += 4 * head if trained else 0
        else:
            handed += copied + n * model.hidden * wide
        return max(forward, handed)


def _aligned(tokens: int) -> int:
    return -(-tokens // ALIGNED) * ALIGNED


def as_trained(stage: StageSpec) -> TrainingSpec:
    """A stage as one that trains, for what is counted alike of an evaluation: nothing adapted, nothing cut."""
    if isinstance(stage, TrainingSpec):
        return stage
    alike = ("precision", "zero", "offload_params", "slurm")
    return TrainingSpec(**{name: getattr(stage, name) for name in alike})
