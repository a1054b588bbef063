"""Embeddings and output heads, whole or split along the vocabulary over the ranks that share a model's layers."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_rlhf.spec.sequence_checks import OWN_LOGITS
from hpc_rlhf.train.algorithms.logprobs import head_log_prob_sum, head_log_probs
from hpc_rlhf.train.parallel import split_modules, tensor_parallel


class LogProbHead(nn.Linear):
    """An output head that, given tokens, returns their log-probabilities instead of the logits.

    It runs inside the head's own forward pass, where ZeRO-3 has gathered the weight.
    """

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor | None = None,
        temperature: float = 1.0,
        with_entropies: bool = False,
        summed: bool = False,
    ) -> Any:
        group = getattr(self, "tensor_group", None)
        if tokens is None and group is None:
            return super().forward(hidden)
        if tokens is None:
            return split_modules.join(super().forward(split_modules.sum_gradients(hidden, group)), group)
        if summed:
            total = head_log_prob_sum(hidden, self.weight, self.bias, tokens, temperature, group)
            return total, hidden.new_empty(0)
        return head_log_probs(hidden, self.weight, self.bias, tokens, temperature, with_entropies, group)


class SplitEmbedding(nn.Embedding):
    """This rank's rows of an embedding. All ranks look up the same tokens and sum the results."""

    tensor_group: Any

    def forward(self, ids: Tensor) -> Tensor:
        group, count = self.tensor_group, len(self.weight)
        first = dist.get_rank(group) * count
        rows, padding = ids - first, self.padding_idx
        elsewhere = (rows < 0) | (rows >= count)
        own_padding = padding - first if padding is not None and first <= padding < first + count else None
        embedded = F.embedding(rows.masked_fill(elsewhere, 0), self.weight, own_padding)
        return split_modules.sum_outputs(embedded.masked_fill(elsewhere.unsqueeze(-1), 0), group)


def has_plain_head(causal: Any) -> bool:
    """True if a model's logits are what its output head, one linear layer, computes."""
    head = causal.get_output_embeddings()
    return type(head) in (nn.Linear, LogProbHead) and not any(
        getattr(causal.config, field, None) for field in OWN_LOGITS
    )


def split_model(model: nn.Module, ways: int) -> None:
    """Replace a model's layers, embeddings and output head by this rank's shards of them, in place. Collective.

    Embeddings and head stay whole if the vocabulary cannot be divided. So does a head, with embeddings that are tied to
    it, if the model changes its logits.

    Args:
        model: contains a transformers model, whole and the same on all ranks.
        ways: number of neighbouring ranks that share a layer; 1 does nothing, nor does a model that is split already.

    Raises:
        HpcRlhfError: the architecture is not supported, or its sizes are not divisible.
    """
    if ways == 1 or any(isinstance(part, split_modules.SplitLinear) for part in model.modules()):
        return
    from transformers import PreTrainedModel

    inner: Any = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    group = tensor_parallel.split_layers(inner, ways)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    has_embedding, has_head = isinstance(embedding, nn.Embedding), isinstance(head, nn.Linear)  # or other stages do
    tied = has_embedding and has_head and head.weight is embedding.weight
    with_embedding = has_embedding and embedding.num_embeddings % ways == 0
    with_head = has_head and has_plain_head(inner) and head.out_features % ways == 0 and (with_embedding or not tied)
    if with_embedding and (with_head or not tied):
        kind = type(embedding)  # it may scale what nn.Embedding looks up
        bases = (SplitEmbedding,) if kind is nn.Embedding else (kind, SplitEmbedding)
        embedding.__class__ = type(f"Split{kind.__name__}", bases, {})
        tensor_parallel.split_rows(embedding, group)
    if with_head:
        head.__class__ = LogProbHead
        tensor_parallel.split_rows(head, group)
