"""Packed sequences: log-probabilities, values and gradients do not depend on the rest of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.language_model import LanguageModel, RewardModel
from hpc_rlhf.train.ragged import Ragged
from tests.train import tiny

ROWS = [torch.randint(3, tiny.VOCABULARY, (n,)).tolist() for n in (7, 1, 19, 4)]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
KINDS = (*tiny.KINDS, "mistral")
# Architectures whose layers do not pass unknown arguments on.
NOT_PASSING_ON = ("stablelm", "nemotron")


def model_of(kind: str, way: str, make: Callable[..., Any] = tiny.causal) -> Any:
    """A model that runs packed, or one that pads."""
    # Mistral with a window shorter than the longest row.
    model = make(kind, **({"sliding_window": 5} if kind == "mistral" else {}))
    if way == "packed":
        packed_attention.enable(model)
        assert model.config._attn_implementation == packed_attention.NAME
    return model


def alone(model: Any, row: list[int], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a sequence from its second token on, by transformers alone."""
    logits = model(input_ids=torch.tensor([row])).logits[0, :-1] / temperature
    log_probs = logits.log_softmax(dim=-1)
    chosen = log_probs.gather(1, torch.tensor(row[1:], dtype=torch.long).unsqueeze(1)).squeeze(1)
    return chosen, -(log_probs.exp() * log_probs).sum(dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["packed", "padded"])
def test_log_probabilities_do_not_depend_on_the_batch(kind: str, way: str) -> None:
    model, plain = LanguageModel(model_of(kind, way)), model_of(kind, "plain")
    batch = Ragged.of(ROWS)
    predicted = batch.tail([len(row) - 1 for row in ROWS])
    log_probs, entropies = model(batch.ids, batch.lengths, predicted, 0.7, with_entropies=True)
    expected = [alone(plain, row, 0.7) for row in ROWS]
    torch.testing.assert_close(log_probs, torch.cat([each[0] for each in expected]), **CLOSE)
    torch.testing.assert_close(entropies, torch.cat([each[1] for each in expected]), **CLOSE)
    assert not entropies.requires_grad

    # The gradients are those of single sequences.
    weights = torch.randn(len(log_probs))
    (log_probs * weights).sum().backward()
    (torch.cat([each[0] for each in expected]) * weights).sum().backward()
    for (name, actual), wanted in zip(model.causal.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["opt", "cohere"])
def test_the_summed_log_probability_matches_the_single_ones(kind: str) -> None:
    """With the same gradients; also with the model's own logits, and with tied embeddings."""
    gradients, batch = [], Ragged.of(ROWS)
    for summed in (False, True):
        model = LanguageModel(tiny.causal(kind, **({"logit_scale": 0.5} if kind == "cohere" else {})))
        actual, _ = model(batch.ids, batch.lengths, batch.tail([2, 0, 9, 3]), 0.7, summed=summed)
        assert summed == (actual.shape == ())
        actual.sum().backward()
        gradients.append([actual.sum(), *(p.grad for p in model.parameters())])
    for each, together in zip(*gradients, strict=True):
        torch.testing.assert_close(each, together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_values_do_not_depend_on_the_batch(kind: str) -> None:
    model = RewardModel(model_of(kind, "packed", tiny.classifier))
    plain = model_of(kind, "plain", tiny.classifier)
    batch = Ragged.of(ROWS)
    expected = [plain.score(plain.base_model(torch.tensor([row])).last_hidden_state)[0, :, 0] for row in ROWS]
    torch.testing.assert_close(model(batch.ids, batch.lengths), torch.cat(expected), **CLOSE)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_activation_checkpointing_changes_nothing(kind: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = LanguageModel(model_of(kind, "packed")).train()
        if checkpointing:
            model.causal.gradient_checkpointing_enable({"use_reentrant": False})
        batch = Ragged.of(ROWS)
        model(batch.ids, batch.lengths, batch.tail([2, 0, 9, 3]))[0].sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_packed_model_also_accepts_padded_rows(kind: str) -> None:
    """transformers' own generate still works on it."""
    model, plain = model_of(kind, "packed"), model_of(kind, "plain")
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    asked = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
    assert torch.equal(model.generate(ids, **asked), plain.generate(ids, **asked))


@pytest.mark.parametrize("kind", NOT_PASSING_ON)
def test_an_architecture_that_does_not_pass_lengths_on_runs_padded(kind: str) -> None:
    model, plain = tiny.causal(kind), tiny.causal(kind)
    packed_attention.enable(model)
    assert model.config._attn_implementation == "sdpa"
    batch = Ragged.of(ROWS)
    actual, _ = LanguageModel(model)(batch.ids, batch.lengths, batch.tail([len(row) - 1 for row in ROWS]))
    torch.testing.assert_close(actual, torch.cat([alone(plain, row, 1.0)[0] for row in ROWS]), **CLOSE)


def test_packed_attention_without_lengths_raises() -> None:
    model = tiny.causal("llama")
    packed_attention.enable(model)
    with pytest.raises(RuntimeError, match="got no lengths for its packed sequences"):
        model(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_unsupported_attention_variants_are_left_alone() -> None:
    model = tiny.causal("llama")
    model.config.attn_logit_softcapping = 30.0
    packed_attention.enable(model)
    assert model.config._attn_implementation == "sdpa"


def test_attention_gradients_in_half_precision_match_single_precision() -> None:
    lengths, scaling = (5, 1, 33), 0.25
    heads = [torch.randn(1, 2, sum(lengths), 16).bfloat16().requires_grad_() for _ in range(3)]
    weight = torch.randn(1, sum(lengths), 2, 16)
    actual, _ = packed_attention.attention(None, *heads, None, scaling=scaling, packed_lengths=lengths)
    grads = torch.autograd.grad((actual * weight).sum(), heads)
    single = [tensor.detach().float().requires_grad_() for tensor in heads]
    parts = zip(*[tensor.split(lengths, 2) for tensor in single], strict=True)
    expected = torch.cat([softmax_attention(*part, scaling).transpose(1, 2) for part in parts], dim=1)
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.01)
    for grad, right in zip(grads, torch.autograd.grad((expected * weight).sum(), single), strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.float(), right, atol=0.03, rtol=0.02)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention by its formula."""
    scores = query @ key.transpose(2, 3) * scaling
    ahead = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, -torch.inf).softmax(dim=-1) @ value


def test_packed_rows_have_few_sizes() -> None:
    """A CPU keeps a kernel for each size. Padding needs no position beyond the model's limit."""
    model = LanguageModel(model_of("opt", "packed"))
    heights = set()
    model.causal.base_model.register_forward_hook(
        lambda module, args, output: heights.add(output.last_hidden_state.shape[1])
    )
    for tokens in range(1000, 2100, 29):
        batch = Ragged.of([[3] * 20] * (tokens // 20) + [[3] * (tokens % 20 + 1)])
        with torch.no_grad():
            model(batch.ids, batch.lengths, batch.tail([1] * len(batch.lengths)))
    assert len(heights) <= 10


def test_a_head_beyond_a_matrix_uses_the_models_own_logits() -> None:
    model = tiny.causal("cohere", logit_scale=0.5)
    language = LanguageModel(model)
    batch = Ragged.of(ROWS)
    actual, _ = language(batch.ids, batch.lengths, batch.tail([len(row) - 1 for row in ROWS]))
    torch.testing.assert_close(actual, torch.cat([alone(model, row, 1.0)[0] for row in ROWS]), **CLOSE)
