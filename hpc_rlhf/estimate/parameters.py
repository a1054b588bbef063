"""A model's parameters, counted from its configuration: no weights are loaded, and no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.job import FromScratch, ModelRef
from hpc_rlhf.spec.training import LoraSpec

# What transformers takes for fields that a configuration leaves out, of the fields that are counted here.
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN = {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "opt": {
        "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        "do_layer_norm_before": True, "_remove_final_layer_norm": False, "activation_function": "relu",
    },
    "gpt2": {
        "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "tie_word_embeddings": True, "activation_function": "gelu_new",
    },
    "gpt_neox": {
        "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
        "num_attention_heads": 64, "tie_word_embeddings": False,
    },
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}  # fmt: skip
_OTHER_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

# Layers, width and heads of the OPT models (arXiv 2205.01068, table 1): for a plan where the hub is not reached.
_OPT_SIZES = {
    "125m": (12, 768, 12), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40), "30b": (48, 7168, 56), "66b": (64, 9216, 72),
}  # fmt: skip
_OPT_350M = {
    "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "word_embed_proj_dim": 512, "do_layer_norm_before": False,
}  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """One linear layer of every block, by the name that adapters are aimed at."""

    name: str
    inner: int
    outer: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.inner * self.outer + self.outer * self.bias


@dataclass(frozen=True)
class Architecture:
    """What a causal language model consists of.

    Attributes:
        layers: blocks.
        linears: of one block.
        norms: parameters of one block's normalisations.
        outside: parameters of embeddings and the last normalisation.
        projections: linear layers outside the blocks, the output head excepted.
        head: parameters of an output head that is not tied to the embeddings.
        hidden: width.
        kv: numbers that one token leaves in the cache of keys and values, in all layers.
        vocabulary: tokens that the head tells apart.
        kept: numbers of each token that a block keeps for its backward pass.
        kept_cut: the same of what tensor parallelism cuts: heads and the wide part of the MLP.
        kept_wide: the same of what is float32 in any precision.
        inner: width of the MLP.
    """

    layers: int
    linears: tuple[Linear, ...]
    norms: int
    outside: int
    projections: tuple[Linear, ...]
    head: int
    hidden: int
    kv: int
    vocabulary: int
    kept: int
    kept_cut: int
    kept_wide: int
    inner: int

    @property
    def largest(self) -> int:
        """Parameters of the largest matrix."""
        return max(self.vocabulary * self.hidden, *(linear.parameters for linear in self.linears))

    @property
    def inside(self) -> int:
        """Parameters of the blocks' linear layers, which tensor parallelism cuts."""
        return self.layers * sum(linear.parameters for linear in self.linears)

    @property
    def body(self) -> int:
        """All parameters but those of an output head."""
        projected = sum(linear.parameters for linear in self.projections)
        return self.inside + self.layers * self.norms + self.outside + projected

    @property
    def parameters(self) -> int:
        """Of the causal language model; what is tied counts once."""
        return self.body + self.head

    def adapters(self, lora: LoraSpec) -> int:
        """Parameters of a model's low-rank adapters."""

        def count(linears: tuple[Linear, ...]) -> int:
            found = (each for each in linears if lora.targets is None or each.name in lora.targets)
            return sum(lora.rank * (each.inner + each.outer) for each in found)

        return self.layers * count(self.linears) + count(self.projections)


def architecture(ref: ModelRef, where: str) -> Architecture:
    """The architecture of a model: made from scratch, in a folder, or in the hub's cache.

    Raises:
        HpcRlhfError: its configuration is not here, or is of a family that is not counted.
    """
    config = _config(ref, where)
    family = config.get("model_type")
    if family not in _DEFAULTS:
        raise HpcRlhfError(
            f"models of the family {family} are not counted", where=where, hint=f"counted are {_families()}"
        )
    given = {key: value for key, value in config.items() if value is not None}
    fields = {**_DEFAULTS[family], **given}
    try:
        return {"opt": _opt, "gpt2": _gpt2, "gpt_neox": _gpt_neox}.get(family, _llama)(fields)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise HpcRlhfError(f"its configuration cannot be counted ({error})", where=where) from error


def _families() -> str:
    return ", ".join(sorted(_DEFAULTS))


def _config(ref: ModelRef, where: str) -> Mapping[str, Any]:
    if isinstance(ref, FromScratch):
        return ref.from_scratch
    if Path(ref).is_absolute():
        return _read(Path(ref) / "config.json", where)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(ref, "config.json")
    if isinstance(cached, str):
        return _read(Path(cached), where)
    known = _known(ref)
    if known is None:
        raise HpcRlhfError(
            f"the configuration of {ref} is not in the cache of the hub",
            where=where,
            hint="bring it there by hpc-rlhf prefetch",
        )
    return known


def _read(path: Path, where: str) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HpcRlhfError(f"{path} cannot be read ({error})", where=where) from error
    if not isinstance(config, dict):
        raise HpcRlhfError(f"{path} holds no configuration", where=where)
    return config


def _known(name: str) -> Mapping[str, Any] | None:
    size = name.removeprefix("facebook/opt-")
    if size == "350m" and size != name:
        return {"model_type": "opt", **_OPT_350M}
    if size == name or size not in _OPT_SIZES:
        return None
    layers, width, heads = _OPT_SIZES[size]
    return {
        "model_type": "opt", "num_hidden_layers": layers, "hidden_size": width, "ffn_dim": 4 * width,
        "num_attention_heads": heads,
    }  # fmt: skip


def _opt(c: Mapping[str, Any]) -> Architecture:
    width, inner, bias = c["hidden_size"], c["ffn_dim"], c.get("enable_bias", True)
    embedded = c.get("word_embed_proj_dim", width)
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    linears = (
        *(Linear(name, width, width, bias) for name in names),
        Linear("fc1", width, inner, bias),
        Linear("fc2", inner, width, bias),
    )
    norm = 2 * width if c.get("layer_norm_elementwise_affine", True) else 0
    last = norm if c["do_layer_norm_before"] and not c["_remove_final_layer_norm"] else 0
    outside = c["vocab_size"] * embedded + (c["max_position_embeddings"] + 2) * width + last
    projections = () if embedded == width else (
        Linear("project_in", embedded, width, False), Linear("project_out", width, embedded, False),
    )  # fmt: skip
    head = 0 if c["tie_word_embeddings"] else c["vocab_size"] * embedded
    layers, heads = c["num_hidden_layers"], c["num_attention_heads"]
    # ReLU keeps but its result, which the next layer keeps too.
    wide = inner if c["activation_function"] == "relu" else 2 * inner
    return Architecture(
        layers, linears, 2 * norm, outside, projections, head, width, 2 * layers * width,
        c["vocab_size"], 4 * width, 4 * width + wide, heads, inner,
    )  # fmt: skip


def _gpt2(c: Mapping[str, Any]) -> Architecture:
    named = {**c, **{old: c[new] for new, old in _OTHER_NAMES.items() if new in c}}
    width, layers = named["n_embd"], named["n_layer"]
    inner = c.get("n_inner", 4 * width)
    linears = (
        Linear("c_attn", width, 3 * width, True), Linear("c_proj", width, width, True),
        Linear("c_fc", width, inner, True), Linear("c_proj", inner, width, True),
    )  # fmt: skip
    outside = (c["vocab_size"] + c["n_positions"]) * width + 2 * width
    head = 0 if c["tie_word_embeddings"] else c["vocab_size"] * width
    # gelu_new is written out: its steps are kept one by one.
    steps = 5 if c["activation_function"] == "gelu_new" else 2
    return Architecture(
        layers, linears, 4 * width, outside, (), head, width, 2 * layers * width,
        c["vocab_size"], 4 * width, 4 * width + steps * inner, named["n_head"], inner,
    )  # fmt: skip


def _gpt_neox(c: Mapping[str, Any]) -> Architecture:
    width, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    bias = c.get("attention_bias", True)
    linears = (
        Linear("query_key_value", width, 3 * width, bias), Linear("dense", width, width, bias),
        Linear("dense_h_to_4h", width, inner, True), Linear("dense_4h_to_h", inner, width, True),
    )  # fmt: skip
    outside = c["vocab_size"] * width + 2 * width
    head = 0 if c["tie_word_embeddings"] else c["vocab_size"] * width
    # Rotated queries and keys stand beside those they were made of.
    return Architecture(
        layers, linears, 4 * width, outside, (), head, width, 2 * layers * width,
        c["vocab_size"], 3 * width, 6 * width + 2 * inner, c["num_attention_heads"], inner,
    )  # fmt: skip


def _llama(c: Mapping[str, Any]) -> Architecture:
    family, width, inner, heads = c["model_type"], c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]  # fmt: skip
    shared, size = c.get("num_key_value_heads", heads), c.get("head_dim", width // heads)
    bias = {"mistral": False, "qwen2": True}.get(family, c.get("attention_bias", False))
    flat = c.get("mlp_bias", False) if family == "llama" else False
    linears = (
        Linear("q_proj", width, heads * size, bias),
        Linear("k_proj", width, shared * size, bias),
        Linear("v_proj", width, shared * size, bias),
        Linear("o_proj", heads * size, width, bias and family != "qwen2"),
        Linear("gate_proj", width, inner, flat),
        Linear("up_proj", width, inner, flat),
        Linear("down_proj", inner, width, flat),
    )
    norms = 2 * width + (2 * size if family == "qwen3" else 0)
    head = 0 if c["tie_word_embeddings"] else c["vocab_size"] * width
    layers = c["num_hidden_layers"]
    outside = c["vocab_size"] * width + width
    # Norms go by float32; heads that share keys and values have copies of their own; all four products of the MLP stay.
    normed = (heads + shared) * size if family == "qwen3" else 0
    return Architecture(
        layers, linears, norms, outside, (), head, width, 2 * layers * shared * size,
        c["vocab_size"], 4 * width, 4 * heads * size + 4 * inner + normed, 2 * width + heads + normed, inner,
    )  # fmt: skip
