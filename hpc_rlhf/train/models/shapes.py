"""``python -m hpc_rlhf.train.models.shapes``: the shapes of models, from their configurations alone.

Reads a JSON list of configurations on stdin and prints a JSON list: for each model the fields of
``estimate.parameters.Architecture``, or {"error": why it cannot be built}. Models are built on the meta device.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from hpc_rlhf.train.models import architectures, chunked_mlp, experts, packed_attention, structure, vocabulary
from hpc_rlhf.train.models.language_model import hidden_states, padded
from hpc_rlhf.train.models.lora import is_linear, sizes
from hpc_rlhf.train.parallel import tensor_parallel

# Bytes per token that are kept, and the part of them inside MLPs: each what is whole under tensor parallelism, and what
# is sharded.
Kept = tuple[list[float], list[float]]

_TOKENS = 64
# The fields for the experts that a token passes through.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def shapes(fields: dict[str, Any]) -> dict[str, Any]:
    """The shapes of a causal language model with these fields in its config.json."""
    # A padding id beyond a small vocabulary is refused, and training sets the tokenizer's anyway.
    whole = type(AutoConfig.for_model(fields["model_type"])).from_dict({**fields, "pad_token_id": 0})
    config = architectures.text_config(whole, has_head=True)
    config.pad_token_id = 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False).eval()
        model.tie_weights()
    packed_attention.enable(model)
    head = model.get_output_embeddings()
    width, layers, heads = config.hidden_size, config.num_hidden_layers, getattr(config, "num_attention_heads", 1)
    shared = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or width // heads
    blocks = _blocks(model, layers)
    inner = max((sizes(layer)[0] for _, layer in _linears(blocks)), default=width)
    linears = Counter((name, *sizes(layer)) for name, layer in _linears(model) if layer is not head)
    by_item_size = _kept_by_item_size(model, blocks, inner)
    tied = head is None or head.weight is model.get_input_embeddings().weight
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "head": 0 if tied else sum(p.numel() for p in head.parameters()),
        "inside": sum(p.numel() for layer in tensor_parallel.divided(model) for p in layer.parameters()),
        "largest": max(p.numel() for p in model.parameters()),
        "linears": [*([*layer, count] for layer, count in linears.items()), *_experts(model, config)],
        "layers": layers,
        "hidden": width,
        "inner": inner,
        "chunked": sum(p.numel() for mlp in chunked_mlp.find(blocks) for p in mlp.parameters()),
        "vocabulary": config.vocab_size,
        "plain_head": vocabulary.has_plain_head(model),
        "kv": 2 * layers * shared * dim,
        "kept": {item: kept for item, (kept, _) in by_item_size.items()},
        "kept_in_mlps": {item: in_mlps for item, (_, in_mlps) in by_item_size.items()},
    }


def _experts(model: Any, text: Any) -> list[list[Any]]:
    """The matrices of experts, as ``estimate.parameters.Linear`` has them."""
    found: Counter[tuple[str, int, int, int]] = Counter()
    for module, name, known in experts.parameters_of_experts(model):
        number, inner, outer, _ = experts.layout(module, name)
        found[known, inner, outer, number] += 1
    chosen = next((n for n in (getattr(text, field, None) for field in _EXPERTS_PER_TOKEN) if isinstance(n, int)), None)
    return [
        [name, inner, outer, number * layers, min(number, chosen or number) * layers]
        for (name, inner, outer, number), layers in found.items()
    ]


def _kept_by_item_size(model: Any, blocks: nn.ModuleList, inner: int) -> dict[int, Kept]:
    """What the blocks keep, by the bytes of a number: in half precision and in single."""
    try:
        half = _kept(model, blocks, inner)
    except Exception:  # forward passes that depend on values do not run on the meta device
        # Close to what is measured of the others: every linear layer's input and output, and the norms'.
        widths = sum(sum(sizes(layer)) for _, layer in _linears(blocks))
        half = [8.0 * len(blocks) * model.config.hidden_size, 2.0 * widths], [0.0, 0.0]
    try:
        single = _kept(model.float(), blocks, inner)
    except Exception:  # some kernels, such as those of experts, take half precision alone
        whole, in_mlps = ([2 * size for size in sizes] for sizes in half)
        single = whole, in_mlps
    return {2: half, 4: single}


def _blocks(model: nn.Module, layers: int) -> nn.ModuleList:
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == layers]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers and their names; of those that share a weight, the first."""
    seen = set()
    for name, layer in model.named_modules():
        if is_linear(layer) and layer.weight not in seen:
            seen.add(layer.weight)
            yield name.rpartition(".")[2], layer


def _kept(model: Any, blocks: nn.ModuleList, inner: int) -> Kept:
    """Bytes per token that the blocks keep for the backward pass, and what of that ``chunked_mlp`` does not keep."""
    for name in ("sdpa", packed_attention.NAME):
        AttentionInterface.register(name, _attention)
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    tensors: dict[int, Tensor] = {}
    in_mlps: set[int] = set()
    inside: set[str] = set()

    def enter(place: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if place == "an MLP":
                keep(inputs[0])
            inside.add(place)

        return hook

    def leave(place: str) -> Any:
        return lambda *_: inside.discard(place)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if "the blocks" in inside and storage not in weights and storage not in tensors:
            tensors[storage] = tensor
            if "an MLP" in inside:
                in_mlps.add(storage)
        return tensor

    hooks = [
        blocks[0].register_forward_pre_hook(enter("the blocks")),
        blocks[-1].register_forward_hook(leave("the blocks")),
    ]
    for mlp in chunked_mlp.find(blocks):
        hooks += mlp.register_forward_pre_hook(enter("an MLP")), mlp.register_forward_hook(leave("an MLP"))
    ids = torch.zeros(_TOKENS, dtype=torch.int64, device="meta")
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if model.config._attn_implementation == packed_attention.NAME:
            hidden_states(structure.body(model), ids, (_TOKENS,))
        else:
            padded(structure.body(model), ids, (_TOKENS,))
    for hook in hooks:
        hook.remove()
    return _split(tensors.values(), inner), _split([tensors[storage] for storage in in_mlps], inner)


def _split(tensors: Iterable[Tensor], inner: int) -> list[float]:
    """Bytes per token: of tensors that tensor parallelism leaves whole; and of those that it shards, which are as wide
    as the MLP or have a dimension of heads."""
    sharded = whole = 0
    for tensor in tensors:
        if tensor.dim() == 4 or tensor.shape[-1:] == (inner,):
            sharded += tensor.untyped_storage().nbytes()
        else:
            whole += tensor.untyped_storage().nbytes()
    return [whole / _TOKENS, sharded / _TOKENS]


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, outputs and normalizers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[3])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    return _Attention.apply(query, key, value), None


def main() -> None:
    logging.disable()
    answers = []
    for fields in json.load(sys.stdin):
        try:
            answers.append(shapes(fields))
        except Exception as error:  # an architecture may object to its configuration in any way
            answers.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
