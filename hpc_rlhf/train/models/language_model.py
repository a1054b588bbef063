"""Forward passes of transformers models over packed sequences: log-probabilities of tokens, and values.

Packed sequences are ``ids``, (tokens,), int64, one sequence after the other, and ``lengths``, the tokens of each. The
layers see one row of real tokens, so nothing is spent on padding, and attention runs sequence by sequence. An
architecture that ``packed_attention`` does not support runs on rows padded on the right instead, and one that mixes
those as well on one sequence at a time. ``agreement`` decides which. Under sequence parallelism, the ranks of a group
pass the same sequences, each sends a share of the row's tokens through the layers, and all return the same outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_rlhf.spec.sizes import ALIGNED
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.logprobs import entropy, token_log_probs
from hpc_rlhf.train.models import packed_attention, rotary, structure, vocabulary
from hpc_rlhf.train.models.score_head import ScoreHead
from hpc_rlhf.train.parallel import sequence_parallel

# An attribute of models whose sequences go through them one by one.
ONE_BY_ONE = "sequences_go_one_by_one"
# An attribute of models without their heads: the process group of the ranks that share packed rows.
SEQUENCE_GROUP = "sequence_group"


def padding(tokens: int, device: torch.device, ranks: int = 1) -> tuple[int, ...]:
    """Lengths of unused sequences that round a packed row up to equal shares of a size that matrix kernels handle well.

    A CPU compiles and keeps a kernel of about 0.8 MiB for every size, so there the shares have one of eight
    sizes between a power of two and the next.
    """
    step, share = ALIGNED, -(-tokens // ranks)
    if device.type == "cpu":
        step = max(step, 1 << max(0, share.bit_length() - 4))
    whole, rest = divmod(ranks * (share + -share % step) - tokens, ALIGNED)
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


def hidden_states(body: Any, ids: Tensor, lengths: tuple[int, ...], embedded: Tensor | None = None) -> Tensor:
    """The last hidden states: (tokens or more, hidden); rows after those of the sequences are padding.

    Args:
        body: a transformers model without its head. If it has a SEQUENCE_GROUP, the hidden states are those of this
            rank's share of the tokens.
        embedded: what the layers of a model that takes packed rows get in place of the tokens' embeddings; in the shape
            that this returns.
    """
    if body.config._attn_implementation == packed_attention.NAME:
        # transformers passes a four-dimensional mask on as it is, instead of building one.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        group, sharing = getattr(body, SEQUENCE_GROUP, None), {}
        extra = padding(len(ids), ids.device, 1 if group is None else dist.get_world_size(group))
        padded_ids, sizes = F.pad(ids, (0, sum(extra))), (*lengths, *extra)
        positions = ragged.positions(sizes, ids.device)
        if group is not None:
            padded_ids, positions = (sequence_parallel.share(each, group) for each in (padded_ids, positions))
            sharing[SEQUENCE_GROUP] = group
        inputs = {"input_ids": padded_ids} if embedded is None else {"inputs_embeds": embedded}
        output = body(
            **{name: each.unsqueeze(0) for name, each in inputs.items()}, attention_mask=unused,
            position_ids=positions.unsqueeze(0), use_cache=False, packed_lengths=sizes, **sharing,
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


class LanguageModel(nn.Module):
    """A causal language model of transformers, which returns log-probabilities without holding all logits."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal
        self.chunked = vocabulary.has_plain_head(causal)
        if self.chunked:
            causal.get_output_embeddings().__class__ = vocabulary.LogProbHead

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
            return self._in_chunks(ids, lengths, predicted, temperature, with_entropies, summed)
        logits = _by_token(self.causal, ids, lengths, "logits")[predicted - 1]
        log_probs = token_log_probs(logits, ids[predicted], temperature)
        if summed:
            return log_probs.sum(), log_probs.new_empty(0)
        return log_probs, entropy(logits.detach(), temperature) if with_entropies else log_probs.new_empty(0)

    def _in_chunks(
        self, ids: Tensor, lengths: tuple[int, ...], predicted: Tensor, temperature: float, with_entropies: bool,
        summed: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The same, from a head that never holds all logits."""
        body, options = structure.body(self.causal), (temperature, with_entropies, summed)
        head: Callable[..., tuple[Tensor, Tensor]] = self.causal.get_output_embeddings()
        hidden, group = hidden_states(body, ids, lengths), getattr(body, SEQUENCE_GROUP, None)
        if group is None:
            return head(hidden[predicted - 1], ids[predicted], *options)
        which, states = sequence_parallel.own(predicted - 1, len(hidden), group)
        log_probs, entropies = head(hidden[states], ids[predicted[which]], *options)
        if summed:
            return sequence_parallel.total(log_probs, group), entropies
        join = partial(sequence_parallel.joined, which=which, count=len(predicted), group=group)
        return join(log_probs), join(entropies) if with_entropies else entropies


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
        body = structure.body(self.classifier)
        values: Tensor = self.classifier.score(hidden_states(body, ids, lengths)).squeeze(-1)
        if (group := getattr(body, SEQUENCE_GROUP, None)) is not None:
            which, states = sequence_parallel.own(torch.arange(len(ids), device=ids.device), len(values), group)
            values = sequence_parallel.joined(values[states], which, len(ids), group)
        return values[: len(ids)] - self.offset

    @property
    def offset(self) -> float:
        return float(getattr(self.classifier.config, "score_offset", 0.0))

    @offset.setter
    def offset(self, offset: float) -> None:
        self.classifier.config.score_offset = offset
