"""MLPs that take a pass part by part, against whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec import model_files
from hpc_rlhf.spec.sizes import MLP_TOKENS
from hpc_rlhf.train.models import architectures, chunked_mlp, structure
from tests.models.families import FAMILIES
from tests.train import tiny
from tests.train.ranks import reports

KINDS = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "cohere", "stablelm", "nemotron")


def pass_over(model: Any, hidden: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """The output, all gradients, and how many numbers are kept for the backward pass."""
    numbers = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal numbers
        numbers += tensor.numel()
        return tensor

    hidden = hidden.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = structure.body(model)(inputs_embeds=hidden).last_hidden_state
    output.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert hidden.grad is not None
    return output.detach(), [hidden.grad, *grads], numbers


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_whole_pass(kind: str, checkpointing: bool) -> None:
    """With checkpointing, autograd keeps the inputs of layers and no more in either case."""
    rows, tokens = MLP_TOKENS // 64 + 5, 64
    model = tiny.causal(kind).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hidden = torch.randn(rows, tokens, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output, grads, kept = pass_over(model, hidden)
    chunked_mlp.enable(model)
    in_parts, their_grads, kept_in_parts = pass_over(model, hidden)
    torch.testing.assert_close(in_parts, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(their_grads, grads, rtol=1e-10, atol=1e-12)
    inner = 2 * rows * tokens * 48  # in two layers
    assert kept - kept_in_parts == 0 if checkpointing else kept - kept_in_parts > inner


def test_dropout_is_the_same_in_the_backward_pass() -> None:
    """The gradient of the last bias is the number of outputs that were not dropped, times their scale."""
    model = tiny.causal("gpt2", resid_pdrop=0.5).train()
    chunked_mlp.enable(model)
    mlp = model.transformer.h[0].mlp
    output = mlp(torch.randn(1, MLP_TOKENS + 1, 32))
    (grad,) = torch.autograd.grad(output.sum(), mlp.c_proj.bias)
    torch.testing.assert_close(grad, 2.0 * (output != 0).sum((0, 1)), rtol=0, atol=1e-3)


def test_models_that_check_accepts_are_those_with_such_mlps() -> None:
    for name, family in FAMILIES.items():
        whole = type(AutoConfig.for_model(family.fields["model_type"])).from_dict({**family.fields, "pad_token_id": 0})
        config = architectures.text_config(whole, has_head=True)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = structure.layers(structure.body(model))
        chunked = layers is not None and bool(chunked_mlp.find(layers[1]))
        assert chunked == (model_files.model_type(family.fields) in model_files.CHUNKED_MLP), name


@pytest.mark.parametrize("kind", ["opt", "mixtral"])
def test_other_models_are_refused(kind: str) -> None:
    with pytest.raises(HpcRlhfError, match=rf"the MLPs of {kind} models cannot take a pass part by part"):
        chunked_mlp.enable(tiny.causal(kind))


RANK = """
import json, sys, torch
from hpc_rlhf.train.runtime.world import join
world = join(2)
import deepspeed
from hpc_rlhf.train.models import chunked_mlp
from hpc_rlhf.train.models.export import gathered
from tests.train import tiny
from tests.train.ranks import reports
model = tiny.causal("llama", intermediate_size=512).model
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
chunked_mlp.enable(model)
sharding = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": sharding, "zero_allow_untested_optimizer": True}
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
engine.train()
for rows in ((100, 20), (20, 100)):
    hidden = torch.randn(rows[world.rank], 64, 32, generator=torch.Generator().manual_seed(world.rank))
    engine.backward(engine(inputs_embeds=hidden, use_cache=False).last_hidden_state.square().mean())
    engine.step()
with gathered(list(model.parameters())):
    print(json.dumps({"weights": [p.double().norm().item() for p in model.parameters()]}))
"""


@pytest.mark.train
def test_ranks_under_zero3_may_have_different_numbers_of_parts() -> None:
    model = tiny.causal("llama", intermediate_size=512).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for rows in ((100, 20), (20, 100)):
        for rank in range(2):
            hidden = torch.randn(rows[rank], 64, 32, generator=torch.Generator().manual_seed(rank))
            (model(inputs_embeds=hidden).last_hidden_state.square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = [p.double().norm().item() for p in model.parameters()]
    for report in reports(RANK, [], 2):
        assert report["weights"] == pytest.approx(expected, rel=1e-5)
