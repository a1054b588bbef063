"""What a GGUF file says of a model's shape and positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor

from hpc_rlhf.train.models.gguf.refusal import refused

FAMILIES = ("llama", "qwen2", "qwen3")


def check(config: Any) -> None:
    """Raise HpcRlhfError if llama.cpp would compute another function than transformers from a config."""
    family = config.model_type
    if family not in FAMILIES:
        raise refused(f"its family is {family}, not one of {', '.join(FAMILIES)}")
    rope = config.rope_parameters
    if getattr(config, "quantization_config", None) is not None:
        raise refused("its weights are quantized")
    if config.hidden_act != "silu":
        raise refused(f"its activation is {config.hidden_act}, not silu")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise refused("its layers have biases")
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise refused("some of its layers have sliding windows")
    if rope["rope_type"] not in ("default", "linear", *(["llama3"] if family == "llama" else [])):
        raise refused(f"its positions are scaled by {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refused("its positions rotate a part of each head")


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def describe(writer: GGUFWriter, config: Any) -> None:
    """Add the shape and positions of a checked config to a file."""
    rope, size = config.rope_parameters, head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def frequency_divisors(config: Any) -> Tensor | None:
    """(head size / 2,) what Llama 3's scaling divides each rotary frequency by; None for other models.

    Wavelengths up to original / high_freq_factor stay, those from original / low_freq_factor on are divided by factor,
    and those between are interpolated, as in ``_compute_llama3_parameters`` of transformers' modeling_rope_utils.py.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()


def permute_rows(weight: Tensor, heads: int) -> Tensor:
    """(heads * size, inputs) a query or key projection of Llama, with rows in llama.cpp's order.

    transformers rotates row i of a head with row i + size / 2; llama.cpp rotates neighbours.
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
