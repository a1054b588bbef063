"""The arithmetic of training a model, as MFU counts it (PaLM, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpc_rlhf.spec.training import TrainingSpec
from hpc_rlhf.train.models import experts
from hpc_rlhf.train.parallel import deepspeed_internals as internals
from hpc_rlhf.train.parallel import tensor_parallel


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of a forward and backward pass, without those of recomputed activations.

    Attributes:
        per_token: of all matrices.
        per_pair: of attention between a token and one in its sequence; the causal half that is masked counts, too.
    """

    per_token: int
    per_pair: int

    @classmethod
    def of(cls, model: Any, spec: TrainingSpec) -> TrainingFlops | None:
        """Those of a transformers model; None with experts, of which a token uses only some."""
        if any(True for _ in experts.parameters_of_experts(model)):
            return None
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        looked_up = 0 if head.weight is embeddings.weight else _full_numel(embeddings.weight)
        weights = sum(map(_full_numel, model.parameters())) - looked_up
        # A forward pass, the gradients of activations, and those of weights, which frozen weights do not need.
        passes = 2 if spec.lora is not None and spec.lora.only else 3
        return cls(2 * passes * weights, 12 * model.config.num_hidden_layers * model.config.hidden_size)

    def total(self, tokens: float, pairs: float) -> float:
        """Those of a step with this many tokens, and pairs of tokens in a sequence."""
        return self.per_token * tokens + self.per_pair * pairs


def _full_numel(parameter: Any) -> int:
    return internals.full_numel(parameter) * tensor_parallel.split_ways(parameter)
