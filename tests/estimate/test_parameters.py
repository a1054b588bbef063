"""Parameters counted from a configuration, held against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.parameters import architecture
from hpc_rlhf.spec.job import FromScratch
from hpc_rlhf.spec.training import LoraSpec

LLAMA = {"vocab_size": 500, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}  # fmt: skip
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "opt", "vocab_size": 500, "hidden_size": 48, "ffn_dim": 100, "num_hidden_layers": 3, "num_attention_heads": 4},
    {"model_type": "opt", "vocab_size": 500, "hidden_size": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "ffn_dim": 100, "num_hidden_layers": 2, "num_attention_heads": 4},
    {"model_type": "gpt2", "vocab_size": 500, "n_embd": 48, "n_layer": 3, "n_head": 4},
    {"model_type": "gpt_neox", **LLAMA},
    {"model_type": "gpt_neox", **LLAMA, "attention_bias": False, "tie_word_embeddings": True},
    {"model_type": "llama", **LLAMA},
    {"model_type": "llama", **LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"model_type": "mistral", **LLAMA, "num_key_value_heads": 2},
    {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 2},
    {"model_type": "qwen3", **LLAMA, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
]  # fmt: skip


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: str(config["model_type"]))
def test_parameters_and_adapters_are_those_of_the_model_itself(config: dict[str, Any]) -> None:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from hpc_rlhf.train.models.lora import adapt

    fields = {key: value for key, value in config.items() if key != "model_type"}
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    model.tie_weights()
    counted = architecture(FromScratch(from_scratch=config), "models.actor")
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    lora = LoraSpec(rank=3)
    adapt(model, lora, 0)
    assert counted.adapters(lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("size", "billions"), [("350m", 0.331), ("1.3b", 1.316), ("66b", 65.7)])
def test_opt_is_known_without_the_hub(
    size: str, billions: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    counted = architecture(f"facebook/opt-{size}", "models.actor").parameters
    assert counted / 1e9 == pytest.approx(billions, rel=0.002)


def test_what_cannot_be_counted_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(HpcRlhfError, match=r"models\.actor.*bloom"):
        architecture(str(tmp_path), "models.actor")
    with pytest.raises(HpcRlhfError, match=r"not in the cache"):
        architecture("nobody/knows-this", "models.actor")
