"""A causal language model that returns log-probabilities of tokens without holding all logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hpc_rlhf.train.algorithms.logprobs import entropy, head_log_prob_sum, head_log_probs, token_log_probs
from hpc_rlhf.train.models.forward import hidden_states, padded

# Config fields of models whose logits are more than the head's output.
OWN_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


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
        if tokens is None:
            return super().forward(hidden)
        if summed:
            return head_log_prob_sum(hidden, self.weight, self.bias, tokens, temperature), hidden.new_empty(0)
        return head_log_probs(hidden, self.weight, self.bias, tokens, temperature, with_entropies)


class LanguageModel(nn.Module):
    """A causal language model for training: packed sequences in, log-probabilities of tokens out.

    Attributes:
        causal: the transformers model.
    """

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal
        head = causal.get_output_embeddings()
        self.chunked = type(head) is nn.Linear and not any(getattr(causal.config, field, None) for field in OWN_LOGITS)
        if self.chunked:
            head.__class__ = LogProbHead

    def forward(
        self, ids: Tensor, lengths: tuple[int, ...], predicted: Tensor, temperature: float = 1.0,
        with_entropies: bool = False, summed: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probabilities of tokens, given those before them in their sequence.

        Args:
            ids: (tokens,), int64; packed sequences.
            lengths: tokens of each sequence.
            predicted: (n,), int64; indices into ids, none of them the first of a sequence.
            temperature: divides the logits.
            with_entropies: return the entropies of the distributions as well.
            summed: return only the sum of the log-probabilities, which is less work.

        Returns:
            Log-probabilities (n,), or their sum (), float32; entropies (n,), float32, in nats and without
            gradient, or (0,).
        """
        if self.chunked:
            hidden = hidden_states(self.causal.base_model, ids, lengths)[predicted - 1]
            outputs: tuple[Tensor, Tensor] = self.causal.get_output_embeddings()(
                hidden, ids[predicted], temperature, with_entropies, summed
            )
            return outputs
        output, real = padded(self.causal, ids, lengths)
        logits = output.logits[real][predicted - 1]
        log_probs = token_log_probs(logits, ids[predicted], temperature)
        if summed:
            return log_probs.sum(), log_probs.new_empty(0)
        return log_probs, entropy(logits.detach(), temperature) if with_entropies else log_probs.new_empty(0)
