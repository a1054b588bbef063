"""Adapters: they change nothing at first, and exported weights contain all they learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.stages.recipes import RECIPES
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models.export import full_weights, module_weights
from hpc_rlhf.train.models.lora import ExpertsAdapter, LoraLinear, adapt, adapters, off
from tests.models.families import FAMILIES
from tests.train import tiny

# Width of the OPT models, by billions of parameters.
WIDTHS = {1.3: 2048, 13.0: 5120, 66.0: 9216}
IDS = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
LORA = LoraSpec(rank=4, alpha=12.0)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def learn(model: Any) -> None:
    """Change all trained weights, as an optimizer would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_new_adapters_change_nothing(kind: str) -> None:
    model = tiny.causal(kind)
    before = model(input_ids=IDS).logits
    adapt(model, LORA, seed=1)
    assert torch.equal(model(input_ids=IDS).logits, before)


# Mixtures whose experts are kept and multiplied in six ways, models that multiply by a layer's weight themselves, a
# router that is a linear layer, and layers that share weights.
FAR = (
    "mixtral",
    "gpt_oss",
    "jetmoe",
    "dbrx",
    "llama4_text",
    "longcat_flash",
    "mamba",
    "gemma3n_text",
    "phimoe",
    "zamba",
)


def family(name: str) -> Any:
    fields = copy.deepcopy(FAMILIES[name].fields)
    return tiny.causal(fields.pop("model_type"), **fields)


@pytest.mark.parametrize("name", FAR)
def test_adapters_compute_what_the_merged_model_computes(name: str) -> None:
    """Outputs, and the gradients of the factors, at a rank that no kernel likes."""
    model, merged = family(name), family(name)
    adapt(model, LoraSpec(rank=3, alpha=6.0), seed=1)
    before = model(input_ids=IDS, use_cache=False).logits.detach()
    torch.testing.assert_close(before, merged(input_ids=IDS, use_cache=False).logits, atol=0, rtol=0)
    learn(model)
    weights = {key: weight.clone() for key, weight in full_weights(module_weights(model))}
    assert merged.load_state_dict(weights, strict=False).unexpected_keys == []
    ours, theirs = (each(input_ids=IDS, use_cache=False).logits for each in (model, merged))
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.detach().std()), rtol=1e-4)
    assert (ours - before).abs().max() > 0.01 * theirs.std()
    for logits in (ours, theirs):
        logits.square().mean().backward()
    grads = {key: parameter.grad for key, parameter in merged.named_parameters()}
    paths = {id(module): path for path, module in model.named_modules()}
    for adapter in adapters(model):
        module, weight = (adapter.module, adapter.name) if isinstance(adapter, ExpertsAdapter) else (adapter, "weight")
        a, b = (factor.detach().clone().requires_grad_() for factor in (adapter.lora_a, adapter.lora_b))
        left, right = adapter.factors(a, b)
        grad = grads[f"{paths[id(module)]}.{weight}"]
        ((left @ right).view_as(grad) * adapter.scale).backward(grad)
        for factor, expected in ((adapter.lora_a, a), (adapter.lora_b, b)):
            assert factor.grad is not None
            assert expected.grad is not None
            tolerance = 1e-4 * float(expected.grad.abs().max())
            torch.testing.assert_close(factor.grad, expected.grad, atol=tolerance, rtol=1e-4)


def test_layers_that_share_a_weight_share_its_adapter() -> None:
    model = family("zamba")
    before = model(input_ids=IDS, use_cache=False).logits.detach()
    adapt(model, LORA, seed=1)
    learn(model)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(adapters(model)) == len({id(layer.frozen) for layer in layers}) < len(layers)
    with off(model), torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("name", FAR[:6])
def test_experts_are_adapted(name: str) -> None:
    model = family(name)
    adapt(model, LORA, seed=1)
    outside = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    inside = [p for p in model.parameters() if p.dim() > 1 and not p.requires_grad and id(p) not in outside]
    adapted = sum(adapter.frozen.numel() for adapter in adapters(model))
    assert adapted > 0.95 * sum(p.numel() for p in inside)
    left_out = family(name)
    adapt(left_out, LoraSpec(rank=4, experts=False), seed=1)
    assert 0 < sum(adapter.frozen.numel() for adapter in adapters(left_out)) < 0.6 * adapted
    with off(model), torch.no_grad():
        learn(model)
        assert torch.equal(model(input_ids=IDS).logits, family(name)(input_ids=IDS).logits)


def test_targets_select_experts_by_the_names_of_their_parameters() -> None:
    model = family("mixtral")
    adapt(model, LoraSpec(rank=4, targets=("q_proj", "down_proj")), seed=1)
    assert {name.rpartition(".")[2] for name in trained(model)} == {
        "lora_a",
        "lora_b",
        "down_proj_lora_a",
        "down_proj_lora_b",
    }
    jetmoe = family("jetmoe")
    adapt(jetmoe, LoraSpec(rank=4, targets=("output_linear",)), seed=1)
    assert len(adapters(jetmoe)) == 4


def test_lora_that_would_leave_out_most_of_a_model_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.mixing = nn.Linear(4, 4), nn.Parameter(torch.zeros(3, 4, 4))

    with pytest.raises(HpcRlhfError, match="only 25% of the weights") as caught:
        adapt(Block(), LORA, seed=1)
    assert caught.value.where == "lora.only"
    for fields in ({"only": False}, {"targets": ("proj",)}):
        adapt(Block(), LoraSpec(rank=4, **fields), seed=1)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("only", [True, False])
def test_merged_weights_give_the_adapted_models_outputs(kind: str, only: bool) -> None:
    model = tiny.causal(kind)
    with torch.no_grad():
        base = model(input_ids=IDS).logits
    adapt(model, LoraSpec(rank=4, alpha=12.0, only=only), seed=1)
    learn(model)
    with torch.no_grad():
        adapted = model(input_ids=IDS).logits
    assert (adapted - base).abs().mean() > 0.1
    merged = tiny.causal(kind, seed=9)
    weights = {name: weight.clone() for name, weight in full_weights(module_weights(model))}
    missing, unexpected = merged.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all("lm_head" in name for name in missing), "a tied head is not listed"
    merged.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_switched_off_adapters_leave_the_base_model(kind: str) -> None:
    model = tiny.causal(kind)
    before = model(input_ids=IDS).logits
    weights = {name: weight.clone() for name, weight in full_weights(module_weights(model))}
    adapt(model, LORA, seed=1)
    learn(model)
    with off(model):
        assert torch.equal(model(input_ids=IDS).logits, before)
        assert all(torch.equal(weight, weights[name]) for name, weight in full_weights(module_weights(model)))
    assert not torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_adapters_train_alone_or_with_all_other_weights(kind: str) -> None:
    everything = trained(tiny.causal(kind))
    only = tiny.causal(kind)
    adapt(only, LORA, seed=1)
    assert trained(only)
    assert all(".lora_a" in name or ".lora_b" in name for name in trained(only))

    also = tiny.causal(kind)
    adapt(also, LoraSpec(rank=4, only=False), seed=1)
    adapted = {name for name, module in also.named_modules() if isinstance(module, LoraLinear)}
    frozen = {f"{name}.weight" for name in adapted}
    expected = {
        name.replace(".bias", ".base.bias") if name.rpartition(".")[0] in adapted else name
        for name in everything - frozen
    }
    assert trained(also) - {f"{n}.lora_{side}" for n in adapted for side in "ab"} == expected


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_linear_layer_but_the_head_is_adapted(kind: str) -> None:
    model = tiny.causal(kind)
    adapt(model, LORA, seed=1)
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    expected = {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    }
    assert names == expected[kind]


def test_targets_select_layers_and_unknown_names_are_rejected() -> None:
    model = tiny.causal("llama")
    adapt(model, LoraSpec(rank=2, targets=("q_proj", "v_proj")), seed=1)
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoraLinear)} == {
        "q_proj", "v_proj",
    }  # fmt: skip
    before = trained(tiny.causal("gpt2"))
    other = tiny.causal("gpt2")
    with pytest.raises(HpcRlhfError, match="no linear layer called q_proj, v_proj") as caught:
        adapt(other, LoraSpec(rank=2, targets=("q_proj", "v_proj")), seed=1)
    assert caught.value.where == "lora.targets"
    assert trained(other) == before, "a refused model is left as it was"


def test_a_reward_models_head_is_trained_in_full() -> None:
    model = tiny.classifier("llama")
    adapt(model, LORA, seed=1)
    assert isinstance(model.score, nn.Linear)
    assert {name for name in trained(model) if ".lora_" not in name} == {"score.weight"}


def test_the_update_is_scaled_by_alpha_over_rank() -> None:
    base = nn.Linear(6, 5, bias=False)
    layer = LoraLinear(base, rank=2, alpha=8.0, seed=1)
    with torch.no_grad():
        layer.lora_b.normal_()
    x = torch.randn(3, 6)
    expected = x @ base.weight.T + 4.0 * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(x @ layer.merged_weight().T, expected)


def test_adapters_are_initialized_from_the_seed_and_differ_by_layer() -> None:
    def starts(seed: int) -> list[torch.Tensor]:
        model = tiny.causal("llama")
        torch.manual_seed(seed * 100)  # the global generator has no effect
        adapt(model, LORA, seed)
        return [m.lora_a.detach() for m in model.modules() if isinstance(m, LoraLinear)]

    first, again, other = starts(1), starts(1), starts(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[3])


class DeepSpeedChatAdapter(nn.Module):
    """An adapter as DeepSpeed-Chat makes it (dschat/utils/module/lora.py, with its lora_scaling of 1)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.scale = base, 1 / rank
        self.right = nn.Parameter(torch.empty(base.in_features, rank))
        self.left = nn.Parameter(torch.zeros(rank, base.out_features))
        nn.init.kaiming_uniform_(self.right, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.right @ self.left * self.scale


def first_step(layer: nn.Module, lr: float, inputs: int) -> float:
    """How much Adam's first step changes a layer's output, as a root mean square."""
    generator = torch.Generator().manual_seed(3)
    x, target = torch.randn(32, inputs, generator=generator), torch.randn(32, 16, generator=generator)
    adam = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr, betas=(0.9, 0.95), weight_decay=0)
    before = layer(x)
    ((before - target) ** 2).sum().backward()
    adam.step()
    return float((layer(x) - before).square().mean().sqrt().detach())


@pytest.mark.parametrize("billions", WIDTHS)
@pytest.mark.parametrize("times", [1, 4])  # attention, and the second layer of the feed-forward network
@pytest.mark.parametrize(("stage", "rate"), [("sft", "lr"), ("ppo", "actor_lr")])
def test_a_recipes_first_step_is_about_that_of_deepspeed_chat(
    billions: float, times: int, stage: str, rate: str
) -> None:
    (fields,) = (r.stages[stage] for r in RECIPES if r.billions == billions and r.trains_adapters)
    lora, inputs = LoraSpec.model_validate(fields["lora"]), WIDTHS[billions] * times
    torch.manual_seed(1)
    base = nn.Linear(inputs, 16).requires_grad_(False)
    ours = first_step(LoraLinear(base, lora.rank, lora.alpha or lora.rank, 7), fields[rate], inputs)  # type: ignore[arg-type]
    theirs = first_step(DeepSpeedChatAdapter(base, 128), 5e-4, inputs)  # the default of --lora_learning_rate
    assert 1 / 3 < ours / theirs < 3, f"{ours / theirs:.2f} times"
