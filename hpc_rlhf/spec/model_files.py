"""What a model's files say about it, read without torch or transformers: its configuration and its score head.

``check`` reads them on a login node, and each stage reads them again before it loads anything.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hpc_rlhf.spec import hub

# Modules that a reward model may keep its head in: score (transformers, OpenRLHF), v_head and v_head.summary (TRL,
# LLaMA-Factory), value_head, reward_head, regression_head (Eurus), regression_layer and gating (ArmoRM), classifier.
HEAD = re.compile(r"^(?!lm_head)\w*(score|classif|reward|value|v_head|rm_head|regression|gating)\w*\.")
# LLaMA-Factory keeps a head beside the weights.
_APART = ("value_head.safetensors", "value_head.bin")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

HEADS = (
    "a head is kept if it is one linear layer with one output; give such a reward model, or a language model to train "
    "one from"
)

# Types of models for which transformers cannot recompute activations in the backward pass.
NO_CHECKPOINTING = frozenset(
    {"cpmant", "ctrl", "gpt_neox_japanese", "jetmoe", "openai-gpt", "reformer", "xlm", "xlnet"}
)
# Types of models whose layers each have an MLP that maps hidden states alone, which can take a pass part by part.
CHUNKED_MLP = frozenset({
    "apertus", "arcee", "bitnet", "codegen", "cohere", "cohere2", "cwm", "diffllama", "doge", "ernie4_5", "exaone4",
    "falcon", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "granite", "helium", "hunyuan_v1_dense", "hyperclovax",
    "internlm3", "jais2", "llama", "minicpm3", "ministral", "ministral3", "mistral", "modernbert-decoder", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "openai-gpt", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_5_text", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "youtu",
})  # fmt: skip

Problem = tuple[str, str]


@dataclass(frozen=True)
class Head:
    """A finished reward model's head: a linear layer with one output.

    Attributes:
        name: of the module in the weights, such as ``score``.
        bias: what it adds to every score.
    """

    name: str
    bias: float = 0.0


class HeadError(Exception):
    """A score head that cannot be kept as it is; the message says why, as a sentence about the model."""


def folder(ref: str) -> Path | None:
    """The folder of a model that is on this machine, in a folder of its own or in the hub's cache."""
    path = Path(ref)
    if path.is_absolute():
        return path if path.is_dir() else None
    return hub.snapshot(ref)


def config(where: Path) -> dict[str, Any]:
    """A model's config.json; empty if it cannot be read, which loading the model will report."""
    return read_json(where / "config.json")


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model within a configuration that may be of images and sound as well."""
    text = fields.get("text_config")
    return text if isinstance(text, dict) else fields


def untrainable(fields: Mapping[str, Any]) -> Problem | None:
    """Why a model with this configuration cannot be trained, and what to do; None if nothing is known against it."""
    quantized = next((each for each in (fields, text_fields(fields)) if each.get("quantization_config")), None)
    if quantized is not None or fields.get("compression_config"):
        method = (quantized or {}).get("quantization_config")
        name = method.get("quant_method") if isinstance(method, dict) else None
        how = f" ({name})" if name else ""
        return f"its weights are quantized{how}, and quantized weights cannot be trained", (
            "give the model's original weights in bf16 or fp32; some are published under another name, others can be "
            "dequantized with transformers and saved"
        )
    if fields.get("is_encoder_decoder"):
        return "it is an encoder and a decoder, and only decoders are trained", "give a causal language model"
    if any(name.endswith("ForMaskedLM") for name in _architectures(fields)):
        return "it is an encoder, and only decoders are trained", "give a causal language model"
    kind = model_type(fields)
    if kind is not None and causal_types() and kind not in causal_types():
        shown = kind if kind.isprintable() else ascii(kind)
        return f"transformers has no causal language model of type {shown}", (
            "give a decoder-only language model; for one that is newer than the installed transformers, update that"
        )
    return None


def model_type(fields: Mapping[str, Any]) -> str | None:
    """The type of the language model; None if the configuration does not say it."""
    kind = text_fields(fields).get("model_type")
    return None if kind is None else str(kind)


def rotary_switch(fields: Mapping[str, Any]) -> int | None:
    """The tokens up to which all sequences have the same rotary frequencies; None if all have, whatever their length.

    Args:
        fields: a configuration's, or the attributes of transformers' object.
    """
    text = text_fields(fields)
    parameters = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        return None
    limits = []
    for each in (parameters, *parameters.values()):  # some models have parameters per kind of layer
        kind = str(each.get("rope_type") or each.get("type")) if isinstance(each, dict) else ""
        if "dynamic" in kind:
            limits.append(text.get("max_position_embeddings"))
        if kind in ("longrope", "su"):
            original = each.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
            limits.append(original or text.get("max_position_embeddings"))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def switches_within(limit: int, longest: int) -> Problem:
    """Why PPO cannot train a model whose rotary frequencies change at ``limit`` tokens on sequences of ``longest``.

    Their first tokens would be sampled with other frequencies than those that the whole sequence is trained with.
    """
    return (
        f"its rotary embedding changes at {limit} tokens, but prompt and response may have {longest}, so that "
        "responses would be sampled from another model than the one that learns from them",
        f"lower data.max_prompt_tokens and data.max_answer_tokens to {limit} together, or train with dpo",
    )


@cache
def causal_types() -> frozenset[str]:
    """The types of which the installed transformers has causal language models, read from its source, because importing
    it takes seconds; empty if they are not found."""
    package = find_spec("transformers")
    for folder in package.submodule_search_locations or () if package else ():
        try:
            source = Path(folder, "models/auto/modeling_auto.py").read_text(encoding="utf-8")
        except OSError:
            continue
        if table := re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES\b.*?^\)", source, re.MULTILINE | re.DOTALL):
            return frozenset(re.findall(r"""^\s*\(["']([^"']+)["'],""", table[0], re.MULTILINE))
    return frozenset()


def is_classifier(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of transformers' classification models of sequences or tokens. ``num_labels``
    does not show it: language models may have it as well."""
    return any(name.endswith("Classification") for name in _architectures(fields))


def _architectures(fields: Mapping[str, Any]) -> list[str]:
    names = fields.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def has_output_head(where: Path) -> bool:
    """Whether a model's files hold an output head; True if they do not show it."""
    files = weight_files(where)
    return files is None or any(name.endswith("lm_head.weight") for name in files)


def shows_heads(where: Path) -> bool:
    """Whether ``score_head`` can see the weights: they are in this folder, in safetensors files."""
    return _head_shapes(where) is not None


def score_head(where: Path) -> Head | None:
    """The head of a finished reward model; None without one.

    Raises:
        HeadError: it is not one linear layer with one output, which is what is trained and exported.
    """
    fields, shapes = config(where), _head_shapes(where)
    apart = next((name for name in _APART if (where / name).exists()), None)
    if apart is not None:
        raise HeadError(f"its score head is in a file of its own, {apart}")
    if is_classifier(fields) and (count := labels(fields)) != 1:
        raise HeadError(not_one(count))
    if shapes is None:  # they are not here, or only torch reads them
        return Head("score") if is_classifier(fields) else None
    heads = {name: shape for name, shape in shapes.items() if HEAD.match(name)}
    if not heads:
        if is_classifier(fields):
            raise HeadError("its configuration is a reward model's, but its weights have no score head")
        return None
    weights = [name for name in heads if name.endswith(".weight")]
    others = heads.keys() - {name.removesuffix("weight") + part for name in weights for part in ("weight", "bias")}
    if is_classifier(fields) and text_fields(fields) is fields:
        parts = Counter(name.split(".")[0] for name in weight_files(where) or ())
        beside = parts.keys() - {"lm_head", *(name.split(".")[0] for name in heads)}
        others |= beside - {max(beside, key=parts.__getitem__, default="")}  # the largest is the model
    if len(weights) != 1 or others:
        raise HeadError(f"its score head is not one linear layer ({', '.join(sorted(heads.keys() | others))})")
    (weight,) = weights
    if len(heads[weight]) != 2 or heads[weight][0] != 1:
        raise HeadError(not_one(heads[weight][0]))
    bias = weight.removesuffix("weight") + "bias"
    return Head(weight.removesuffix(".weight"), _number(where, bias) if bias in heads else 0.0)


def labels(fields: Mapping[str, Any]) -> Any:
    """How many labels transformers gives a classifier with this configuration."""
    names = fields.get("id2label")
    return len(names) if isinstance(names, dict) and names else fields.get("num_labels", 2)


def not_one(labels: Any) -> str:
    """What is wrong with a reward model that does not have one label."""
    return f"it scores {labels} labels, one is needed"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def weight_files(where: Path) -> dict[str, str] | None:
    """The safetensors file of each tensor; None if the weights are in none."""
    if (where / _INDEX).exists():
        files: dict[str, str] = read_json(where / _INDEX).get("weight_map", {})
        return files
    return dict.fromkeys(_header(where / _WEIGHTS), _WEIGHTS) if (where / _WEIGHTS).exists() else None


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file, as its header describes them; empty if it is incomplete."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header: dict[str, dict[str, Any]] = json.loads(file.read(min(size, 2**27)))
    except (OSError, ValueError, struct.error):
        return {}
    header.pop("__metadata__", None)
    return header


def shapes(where: Path) -> dict[str, list[int]] | None:
    """The shape of each tensor of a model; None if they are not in safetensors files here."""
    files = weight_files(where)
    return _shapes(files, where) if files else None


def _head_shapes(where: Path) -> dict[str, list[int]] | None:
    """The shapes of a model's tensors that may belong to a head; None if they are not in safetensors files here."""
    files = weight_files(where)
    return None if not files else _shapes({name: file for name, file in files.items() if HEAD.match(name)}, where)


def _shapes(files: Mapping[str, str], where: Path) -> dict[str, list[int]] | None:
    headers = {file: _header(where / file) for file in set(files.values())}
    if any(name not in headers[file] for name, file in files.items()):
        return None
    return {name: headers[file][name]["shape"] for name, file in files.items()}


def _number(where: Path, name: str) -> float:
    """The value of a tensor with one element."""
    path = where / (weight_files(where) or {})[name]
    tensor = _header(path)[name]
    start, end = tensor["data_offsets"]
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + size + start)
        content = file.read(end - start)
    if tensor["dtype"] == "BF16":  # the first half of a float32
        return float(struct.unpack("<f", b"\0\0" + content)[0])
    return float(struct.unpack({"F16": "<e", "F32": "<f", "F64": "<d"}[tensor["dtype"]], content)[0])
