"""Models' shapes against the models that training builds."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate import parameters
from hpc_rlhf.estimate.parameters import architecture, architectures
from hpc_rlhf.spec.job import FromScratch, ModelsSpec
from hpc_rlhf.spec.training import LoraSpec

CASES = Path(__file__).parents[3] / "shared/cases/architectures.py"
LLAMA = {"vocab_size": 500, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}  # fmt: skip  # noqa: E501
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "opt", "vocab_size": 500, "hidden_size": 48, "ffn_dim": 100, "num_hidden_layers": 3, "num_attention_heads": 4},  # noqa: E501
    {"model_type": "opt", "vocab_size": 500, "hidden_size": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "ffn_dim": 100, "num_hidden_layers": 2, "num_attention_heads": 4},  # noqa: E501
    {"model_type": "gpt2", "vocab_size": 500, "n_embd": 48, "n_layer": 3, "n_head": 4},
    {"model_type": "gpt_neox", **LLAMA, "attention_bias": False, "tie_word_embeddings": True},
    {"model_type": "llama", **LLAMA},
    {"model_type": "llama", **LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},  # noqa: E501
    {"model_type": "mistral", **LLAMA, "num_key_value_heads": 2},
    {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 2},
    {"model_type": "qwen3", **LLAMA, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    {"model_type": "phi3", **LLAMA, "num_key_value_heads": 2},
    {"model_type": "gemma2", **LLAMA, "num_key_value_heads": 2, "head_dim": 16},
    {"model_type": "starcoder2", **LLAMA, "num_key_value_heads": 2},
    {"model_type": "olmo2", **LLAMA, "num_key_value_heads": 2},
    {"model_type": "bloom", "vocab_size": 500, "hidden_size": 48, "n_layer": 3, "n_head": 4},
    {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **LLAMA, "num_key_value_heads": 2, "head_dim": 16}},  # noqa: E501
    {"model_type": "qwen3_moe", **LLAMA, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32},  # noqa: E501
    {"model_type": "mixtral", **LLAMA, "num_local_experts": 4},
    {"model_type": "gpt_oss", **LLAMA, "num_key_value_heads": 2, "num_local_experts": 4},
    {"model_type": "jetmoe", **LLAMA, "num_key_value_heads": 2, "num_local_experts": 4, "kv_channels": 12},
]  # fmt: skip


def check(configs: list[dict[str, Any]]) -> None:
    """Hold shapes against models with weights, built and adapted as training does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hpc_rlhf.train.models.lora import adapt

    lora = LoraSpec(rank=3)
    for config, shapes in zip(configs, architectures(configs), strict=True):
        assert not isinstance(shapes, str), (config, shapes)
        fields = {key: value for key, value in config.items() if key != "model_type"}
        whole = AutoConfig.for_model(config["model_type"], **{**fields, "pad_token_id": 0})
        model = AutoModelForCausalLM.from_config(whole.get_text_config())
        assert shapes.parameters == sum(p.numel() for p in model.parameters()), config
        body = model.base_model if model.base_model is not model else None
        if body is not None:
            assert shapes.scored - shapes.hidden == sum(p.numel() for p in body.parameters()), config
        adapt(model, lora, 0)
        assert shapes.adapters(lora) == sum(p.numel() for p in model.parameters() if p.requires_grad), config


def test_parameters_and_adapters_equal_those_of_the_built_model() -> None:
    check(FAMILIES)


def test_experts_can_be_left_out_and_a_token_passes_through_some() -> None:
    (mixtral,) = architectures([config for config in FAMILIES if config["model_type"] == "mixtral"])
    assert isinstance(mixtral, parameters.Architecture)
    experts = [each for each in mixtral.linears if each.passed is not None]
    assert [(each.name, each.inputs, each.outputs, each.count, each.passed) for each in experts] == [
        ("gate_up_proj", 48, 160, 12, 6), ("down_proj", 80, 48, 12, 6),
    ]  # fmt: skip
    left_out = mixtral.adapters(LoraSpec(rank=3)) - mixtral.adapters(LoraSpec(rank=3, experts=False))
    assert left_out == 3 * 12 * (48 + 160 + 80 + 48)


@pytest.mark.skipif(not CASES.exists(), reason=f"{CASES} is not here: only the families listed above are tested")
def test_every_known_architecture_is_counted() -> None:
    cases = runpy.run_path(str(CASES))["ARCHITECTURES"]
    check([{"model_type": kind, **fields} for kind, fields in cases.values()])


@pytest.mark.parametrize(("size", "billions"), [("350m", 0.331), ("1.3b", 1.316), ("66b", 65.7)])
def test_opt_is_known_without_the_hub(
    size: str, billions: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    counted = architecture(ModelsSpec(actor=f"facebook/opt-{size}"), "actor").parameters
    assert counted / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.slow
def test_the_shapes_of_opt_are_those_that_transformers_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(parameters, "_known", {})
    models = json.loads(Path(parameters.__file__).with_name("opt.json").read_text())
    counted = architectures([model["config"] for model in models.values()])
    for name, built in zip(models, counted, strict=True):
        monkeypatch.setattr(parameters, "_known", {})
        assert architecture(ModelsSpec(actor=name), "actor") == built


def test_a_model_is_built_once_for_all_later_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    models = ModelsSpec(actor=FromScratch(from_scratch={"model_type": "llama", **LLAMA}))
    monkeypatch.setattr(parameters, "_known", {})
    first = architecture(models, "actor")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(parameters, "_known", {})
    assert architecture(models, "reward") == first


def test_an_unknown_model_is_one_clear_error(tmp_path: Path) -> None:
    folder = ModelsSpec(actor=str(tmp_path))
    with pytest.raises(HpcRlhfError, match=r"models\.actor.*cannot be read"):
        architecture(folder, "actor")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(HpcRlhfError, match=r"models\.actor.*cannot be built.*no-such-family"):
        architecture(folder, "actor")
    with pytest.raises(HpcRlhfError, match=r"models\.reward.*not in the hub cache"):
        architecture(ModelsSpec(actor="facebook/opt-125m", reward="nobody/knows-this"), "reward")
