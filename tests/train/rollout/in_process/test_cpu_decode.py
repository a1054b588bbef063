"""Layers packed for decode steps give the same outputs."""

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
def test_packed_layers_give_the_outputs_of_their_layers(kind: str) -> None:
    model = tiny.causal(kind, tie_word_embeddings=False).bfloat16()
    ids = torch.randint(3, tiny.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    packed = pack_layers(model)
    together = {len(linear.layers) for linear in packed}
    assert together == ({1} if kind == "gpt2" else {1, 3} if kind == "opt" else {1, 2, 3})
    layers = [layer for linear in packed for layer in linear.layers]
    assert {id(layer) for layer in layers} == {id(m) for m in model.modules() if type(m) is nn.Linear}
    assert len(layers) == len(set(map(id, layers)))
    for linear in packed:
        linear.fill()
    for layer in layers:  # the packed layers do not use them
        layer.weight.data = layer.weight.data.new_empty(0)
    outputs = model(ids).logits.float()
    assert float((outputs - expected).norm() / expected.float().norm()) < 0.01
    for linear in packed:
        linear.clear()
    assert all(linear.weight is None for linear in packed)


@torch.no_grad()
def test_fused_layers_with_different_inputs_have_their_own_outputs() -> None:
    model = tiny.causal("llama").bfloat16()
    attention = model.model.layers[0].self_attn
    one, other = torch.randn(2, 3, 32).bfloat16().unbind()
    expected = [attention.q_proj(one), attention.k_proj(other), attention.v_proj(one)]
    for linear in pack_layers(model):
        linear.fill()
    outputs = [attention.q_proj(one), attention.k_proj(other), attention.v_proj(one)]
    assert all(torch.allclose(*pair, rtol=0.02, atol=0.02) for pair in zip(outputs, expected, strict=True))


def test_single_precision_layers_are_not_packed() -> None:
    assert pack_layers(tiny.causal("llama")) == []
