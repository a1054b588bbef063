"""Which models tensor parallelism splits, and whether it can split one of these sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hpc_rlhf.spec import model_files
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.model_files import Problem
from hpc_rlhf.spec.stages import kind_of
from hpc_rlhf.spec.training import TrainingSpec

# Tests compare a split model of each, with its usual options, with the whole one.
ARCHITECTURES = (
    "afmoe", "arcee", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "gpt_neox", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "helium",
    "hunyuan_v1_moe", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jamba", "kimi_linear", "lfm2_moe", "llama",
    "minicpm3", "minimax", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron",
    "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open", "starcoder2",
    "vaultgemma",
)  # fmt: skip
# Whose attention every rank computes as a whole, after it has put the split queries, keys and values together.
_WHOLE_ATTENTION = ("olmo2", "olmo3", "phi3")
# Options that add layers which are not split.
_UNSPLIT = ("use_qk_norm", "enable_moe_block")
_SIZES = {
    "attention heads": ("num_attention_heads",),
    "key and value heads": ("num_key_value_heads",),
    "key and value heads of some layers": ("num_global_key_value_heads",),
    "feed-forward units": ("intermediate_size", "ffn_dim"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}


def problems(spec: JobSpec, configs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str | None]]:
    """For each problem the field of the spec, what is wrong and what to do.

    Args:
        configs: of the models that are here, by their name in the spec.
    """
    for name in spec.stage_names:
        stage = spec.stage(name)
        if isinstance(stage, TrainingSpec) and stage.tensor_parallel > 1:
            for model in kind_of(name).models:
                if model in configs and (problem := unsplit(configs[model], stage.tensor_parallel)):
                    yield f"stages.{name}.tensor_parallel", f"models.{model}: {problem[0]}", problem[1]


def unsplit(fields: Mapping[str, Any], ways: int) -> Problem | None:
    """Why the layers of a model cannot be split over ``ways`` ranks, and what to do; None if they can.

    Args:
        fields: a configuration's.
    """
    text = model_files.text_fields(fields)
    kind = model_files.model_type(fields)
    if kind not in ARCHITECTURES:
        hint = "leave it out and use zero: 3, which shards any model; docs/strategy.md lists the types that it splits"
        return f"tensor_parallel does not support {kind} models", hint
    if option := next((name for name in _UNSPLIT if text.get(name)), None):
        return f"tensor_parallel does not support {kind} models with {option}", "leave it out and use zero: 3"
    for what, names in _SIZES.items():
        count = next((text[name] for name in names if isinstance(text.get(name), int)), ways)
        if count % ways and not (kind in _WHOLE_ATTENTION and "heads" in what):
            return (
                f"its {count} {what} cannot be divided among {ways} ranks (tensor_parallel: {ways})",
                "set tensor_parallel to a divisor of it, or leave it out and use zero: 3",
            )
    return None
