"""Without torch's private operators, results are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hpc_rlhf.train.models import cpu_kernels, packed_attention
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.rollout.backend import GenerationRequest, Sampling
from hpc_rlhf.train.rollout.in_process.cpu_decode import pack_layers
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny

ROWS = [[5, 6, 7, 8, 9, 10, 3], [11], [12, 13, 14, 15] * 10]


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_RLHF_CPU_KERNELS", "0")

    def private(*_: Any) -> None:
        raise AssertionError("a private operator was used")

    monkeypatch.setattr(cpu_kernels.PackedAttention, "apply", private)
    for name in ("pack_weight", "packed_linear", "trace"):
        monkeypatch.setattr(cpu_kernels, name, private)


def learn(kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probabilities of packed sequences, and the gradients of all weights."""
    model = tiny.causal(kind).to(dtype)
    packed_attention.enable(model)
    batch = Ragged.of(ROWS)
    log_probs, _ = LanguageModel(model)(batch.ids, batch.lengths, batch.tail([6, 0, 39]))
    log_probs.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [log_probs.detach(), torch.cat([gradient.flatten() for gradient in gradients]).float()]


def respond(kind: str, world: World) -> list[list[int]]:
    """Responses to more prompts than there are rows, with decode steps traced if they can be."""
    engine = RolloutEngine(tiny.causal(kind, tie_word_embeddings=False), world)
    engine.step.steps_to_trace = 2
    keys = [(row,) for row in range(len(ROWS))]
    request = GenerationRequest(ROWS, 12, tiny.VOCABULARY, Sampling(), keys, max_batch=2)
    responses = engine.generate(request).responses
    assert (engine.step.trace is not None) == cpu_kernels.enabled()
    return responses


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_training_is_the_same(kind: str, dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest) -> None:
    expected = learn(kind, dtype)
    request.getfixturevalue("off")
    for ours, theirs in zip(learn(kind, dtype), expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_responses_are_the_same(kind: str, world: World, request: pytest.FixtureRequest) -> None:
    expected = respond(kind, world)
    request.getfixturevalue("off")
    assert respond(kind, world) == expected


@pytest.mark.usefixtures("off")
def test_no_layers_are_packed() -> None:
    assert pack_layers(tiny.causal("llama").bfloat16()) == []


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masked", ["unmasked", "bool", "float"])
def test_attention_of_one_query(masked: str, scaling: float | None) -> None:
    """The attention of a bfloat16 decode step is torch's of the same numbers in float32, rounded once or twice."""
    torch.manual_seed(0)
    query, keys, values = (torch.randn(3, 4, n, 8, dtype=torch.bfloat16) for n in (1, 40, 40))
    visible = torch.arange(40) < torch.tensor([40, 7, 1]).view(3, 1, 1, 1)
    masks = {"unmasked": None, "bool": visible, "float": torch.zeros(3, 1, 1, 40).masked_fill(~visible, -torch.inf)}
    mask = masks[masked]
    expected = F.scaled_dot_product_attention(query.float(), keys.float(), values.float(), mask, scale=scaling)
    half = mask.bfloat16() if masked == "float" and mask is not None else mask
    output, _ = packed_attention.attention(None, query, keys, values, half, scaling=scaling)
    torch.testing.assert_close(output.float(), expected.transpose(1, 2), atol=0.03, rtol=0.02)
