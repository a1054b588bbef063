"""Write a GGUF file: what it says of the model, then the weights one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)  # fmt: skip
from safetensors import safe_open
from torch import Tensor

from hpc_rlhf.train.models.gguf import architecture, vocabulary
from hpc_rlhf.train.models.gguf.refusal import refused

_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def write_gguf(folder: Path, out: Path, title: str) -> None:
    """Write a model folder as a GGUF file, in the precision of its weights; norms and biases are in float32.

    Args:
        title: the name of the model, for people.

    Raises:
        HpcRlhfError: the model cannot be mapped.
        OSError: the file cannot be written.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if (folder / "adapter_config.json").exists():
        raise refused("it is an adapter without its base model")
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    architecture.check(config)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    ends = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]))
    writer = GGUFWriter(out, config.model_type)
    writer.add_name(title)
    architecture.describe(writer, config)
    vocabulary.describe(writer, tokenizer, config.vocab_size, [end for end in ends if end is not None])
    infos = [(name, tensor.shape, tensor.nbytes, tensor.dtype) for name, tensor in _tensors(folder, config)]
    writer.add_file_type(_file_type({dtype for _, shape, _, dtype in infos if len(shape) > 1}))
    for name, shape, size, dtype in infos:
        writer.add_tensor_info(name, shape, numpy.dtype("f4"), size, raw_dtype=_TYPES[dtype][0])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(folder, config):
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


def _file_type(matrices: set[torch.dtype]) -> LlamaFileType:
    """The kind of a file, from the precision of its matrices."""
    if len(matrices) != 1 or not matrices <= set(_TYPES):
        raise refused(f"its weights are {' and '.join(sorted(map(str, matrices)))}")
    return _TYPES[matrices.pop()][1]


def _tensors(folder: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the file with its name."""
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    divisors = architecture.frequency_divisors(config)
    if divisors is not None:
        yield f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight", divisors
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in _weights(folder, config):
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise refused(f"its weight {name} has no name there")
        projection = name.split(".")[-2]
        if kind == MODEL_ARCH.LLAMA and projection in heads:
            tensor = architecture.permute_rows(tensor, heads[projection])
        yield mapped, tensor.float() if tensor.dim() == 1 else tensor


def _weights(folder: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the folder with its name.

    Raises:
        HpcRlhfError: there are others than the model has.
    """
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    missing = _names(config)
    for file in sorted(files):
        with safe_open(str(folder / file), "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                if name not in missing:
                    raise refused(f"its weight {name} is not one of the model")
                missing.remove(name)
                yield name, weights.get_tensor(name)
    if missing:
        raise refused(f"its weight {min(missing)} is missing")


def _names(config: Any) -> set[str]:
    """The names of the model's weights; tied ones have one name."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name for name, _ in model.named_parameters()}
