"""Forward passes of transformers models over packed sequences: log-probabilities of tokens, and values.

Packed sequences are ``ids``, (tokens,), int64, one sequence after the other, and ``lengths``, the tokens of each. The
layers see one row of real tokens, so nothing is spent on padding, and attention runs sequence by sequence. An
architecture that ``packed_attention`` does not support runs on rows padded on the right instead, and one that mixes
those as well on one sequence at a time. ``agreement`` decides which.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_rlhf.spec.sizes import ALIGNED
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.logprobs import entropy, head_log_prob_sum, head_log_probs, token_log_probs
from hpc_rlhf.train.models import packed_attention, rotary, structure
from hpc_rlhf.train.models.score_head import ScoreHead

# Config fields of models whose logits are more than the head's output.
OWN_LOGITS = (
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale", "logits_scaling",
    "lm_head_multiplier", "logits_mup_width_multiplier",
)  # fmt: skip


# An attribute of models whose sequences go through them one by one.
ONE_BY_ONE = "sequences_go_one_by_one"


def _padding(tokens: int, device: torch.device) -> tuple[int, ...]:
    """Lengths of unused sequences that round a packed row up to a size that matrix kernels handle well.

    A CPU compiles and keeps a kernel of about 0.8 MiB for every size, so there its rows have one of eight
    sizes between a power of two and the next.
    """
    step = ALIGNED
    if device.type == "cpu":
        step = max(step, 1 << max(0, tokens.bit_length() - 4))
    whole, rest = divmod(-tokens % step, ALIGNED)
    return (ALIGNED,) * whole + ((rest,) if rest else ())


def padded(model: Any, ids: Tensor, lengths: tuple[int, ...]) -> tuple[Any, Tensor]:
    """A forward pass over right-padded rows, with position ids if the architecture takes them.

    Returns:
        transformers' output, and (batch, longest), bool, True on real tokens.
    """
    rows, real = ragged.pad(ids, lengths), ragged.mask(lengths, ids.device)
    positions = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions["position_ids"] = torch.arange(rows.shape[1], device=ids.device).expand_as(rows)
        if rotary.switch_length(model.config) is not None:  # padding must not make a row longer
            last = torch.tensor(lengths, device=ids.device).unsqueeze(1) - 1
            positions["position_ids"] = positions["position_ids"].minimum(last)
    return model(input_ids=rows, attention_mask=real.long(), use_cache=False, **positions), real


def hidden_states(body: Any, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The last hidden states: (tokens or more, hidden); rows after those of the sequences are padding.

    Args:
        body: a transformers model without its head.
    """
    if body.config._attn_implementation == packed_attention.NAME:
        # transformers passes a four-dimensional mask on as it is, instead of building one.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        padding = _padding(len(ids), ids.device)
        padded_ids, sizes = F.pad(ids, (0, sum(padding))), (*lengths, *padding)
        positions = ragged.positions(sizes, ids.device)
        output = body(
            input_ids=padded_ids.unsqueeze(0), attention_mask=unused, position_ids=positions.unsqueeze(0),
            use_cache=False, packed_lengths=sizes,
        )  # fmt: skip
        packed_hidden: Tensor = output.last_hidden_state[0]
        return packed_hidden
    return _by_token(body, ids, lengths, "last_hidden_state")


def _by_token(model: Any, ids: Tensor, lengths: tuple[int, ...], field: str) -> Tensor:
    """A field of transformers' output for each token, (tokens, …): from padded rows, or from one row at a time."""
    passes: list[tuple[Tensor, tuple[int, ...]]] = [(ids, lengths)]
    if getattr(model, ONE_BY_ONE, False):
        passes = [(part, (len(part),)) for part in ids.split(list(lengths))]
    return torch.cat([output[field][real] for output, real in (padded(model, *each) for each in passes)])


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
    """A causal language model of transformers, which returns log-probabilities without holding all logits."""

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
            predicted: (n,), int64; indices into ids, none of them the first of a sequence.
            temperature: divides the logits.
            with_entropies: return the entropies of the distributions as well.
            summed: return only the sum of the log-probabilities, which is less work.

        Returns:
            Log-probabilities (n,), or their sum (), float32; entropies (n,), float32, in nats and without
            gradient, or (0,).
        """
        if self.chunked:
            hidden = hidden_states(structure.body(self.causal), ids, lengths)[predicted - 1]
            outputs: tuple[Tensor, Tensor] = self.causal.get_output_embeddings()(
                hidden, ids[predicted], temperature, with_entropies, summed
            )
            return outputs
        logits = _by_token(self.causal, ids, lengths, "logits")[predicted - 1]
        log_probs = token_log_probs(logits, ids[predicted], temperature)
        if summed:
            return log_probs.sum(), log_probs.new_empty(0)
        return log_probs, entropy(logits.detach(), temperature) if with_entropies else log_probs.new_empty(0)


class RewardModel(nn.Module):
    """A language model's body with a linear head without bias: one value per token.

    It wraps transformers' sequence classification model with one label, so that its folder loads with
    ``AutoModelForSequenceClassification``; or a class of the same form, where transformers has none.

    The head computes in float32; see ``ScoreHead``. Values are its outputs minus an offset, which the config keeps as
    ``score_offset``.
    """

    def __init__(self, classifier: Any, exact: Tensor | None = None) -> None:
        super().__init__()
        self.classifier = classifier
        classifier.score.__class__ = ScoreHead
        classifier.score.exact = exact

    def forward(self, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Values of packed sequences: (tokens,), float32."""
        hidden = hidden_states(structure.body(self.classifier), ids, lengths)
        values: Tensor = self.classifier.score(hidden)[: len(ids)].squeeze(-1)
        return values - self.offset

    @property
    def offset(self) -> float:
        return float(getattr(self.classifier.config, "score_offset", 0.0))

    @offset.setter
    def offset(self, offset: float) -> None:
        self.classifier.config.score_offset = offset
