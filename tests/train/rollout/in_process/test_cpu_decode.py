"""Matrices laid out for decode steps: the same layers, the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_rlhf.train.rollout.in_process.cpu_decode import pack_layers
from tests.train import tiny

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16"
)


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_laid_out_matrices_give_what_their_layers_give(kind: str) -> None:
    model = tiny.causal(kind, tie_word_embeddings=False).bfloat16()
    ids = torch.randint(3, tiny.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    found = pack_layers(model)
    together = {len(linear.layers) for linear in found}
    assert together == ({1} if kind == "gpt2" else {1, 3} if kind == "opt" else {1, 2, 3})
    layers = [layer for linear in found for layer in linear.layers]
    assert {id(layer) for layer in layers} == {id(m) for m in model.modules() if type(m) is nn.Linear}
    assert len(layers) == len(set(map(id, layers)))
    for linear in found:
        linear.fill()
    for layer in layers:  # which the packed layers do not look at
        layer.weight.data = layer.weight.data.new_empty(0)
    made = model(ids).logits.float()
    assert float((made - expected).norm() / expected.float().norm()) < 0.01
    for linear in found:
        linear.clear()
    assert all(linear.weight is None for linear in found)


@torch.no_grad()
def test_layers_that_are_given_different_inputs_have_each_its_own_output() -> None:
    model = tiny.causal("llama").bfloat16()
    attention = model.model.layers[0].self_attn
    one, other = torch.randn(2, 3, 32).bfloat16().unbind()
    expected = [attention.q_proj(one), attention.k_proj(other), attention.v_proj(one)]
    for linear in pack_layers(model):
        linear.fill()
    made = [attention.q_proj(one), attention.k_proj(other), attention.v_proj(one)]
    assert all(torch.allclose(*pair, rtol=0.02, atol=0.02) for pair in zip(made, expected, strict=True))


def test_single_precision_keeps_its_layers() -> None:
    assert pack_layers(tiny.causal("llama")) == []
