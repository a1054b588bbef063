"""Tensor parallelism: layers cut over the ranks of a group by DeepSpeed's AutoTP, and their weights made whole again.

Attention heads and the width of the feed-forward layers are shared out; embeddings, norms and the output head stay
whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError

# Architectures whose layers have the names below, tried out against the whole model by the tests.
ARCHITECTURES = ("llama", "mistral", "opt", "qwen2", "qwen3")
# Of these a rank has some of the outputs.
COLUMNS = "q_proj|k_proj|v_proj|gate_proj|up_proj|fc1"
# Of these a rank has the inputs that it has the outputs of before; what comes out is summed over the group.
ROWS = "o_proj|out_proj|down_proj|fc2"
# Whole on every rank, each of which sees its own heads only: their gradients are summed over the group.
BETWEEN = "q_norm|k_norm"


def cut(model: nn.Module, tensor_parallel: int) -> None:
    """Leave this rank its part of every layer, in place. Collective.

    Args:
        model: holds a transformers model, whole and the same on all ranks.
        tensor_parallel: neighbouring ranks that share a layer; at 1 nothing is done.

    Raises:
        HpcRlhfError: the architecture is none of those known, or its sizes do not come out even.
    """
    if tensor_parallel == 1:
        return
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec
    from deepspeed.module_inject.layers import LinearLayer, TensorParallel_Layer, set_autotp_mode
    from deepspeed.utils import groups
    from transformers import PreTrainedModel

    config = next(part.config for part in model.modules() if isinstance(part, PreTrainedModel))
    _check(config, tensor_parallel)

    def layers(names: str, how: PartitionType, summed: bool = False) -> TPLayerSpec:
        return TPLayerSpec([rf".*\.({names})\.weight$"], how, grad_allreduce=summed)

    specs = [
        layers(COLUMNS, PartitionType.COLUMN),
        layers(ROWS, PartitionType.ROW),
        layers(BETWEEN, PartitionType.SKIP, summed=True),
    ]
    groups._init_tp_mesh_device(tensor_parallel)
    set_autotp_mode(training=True)
    autotp = AutoTP(
        module=model, all_reduce_linears=(), prefix="", state_dict=None, linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None, partition_config=AutoTPConfig(tp_size=tensor_parallel, layer_specs=specs),
        model_config=config, training_mode=True,
    )  # fmt: skip
    autotp.set_tensor_parallel_config(tensor_parallel, groups.get_tensor_model_parallel_group())
    autotp.update_linear_policies()
    autotp._replace_module(model)
    autotp.register_replicated_grad_hooks(model)
    for layer in model.modules():
        if isinstance(layer, TensorParallel_Layer):
            layer.cut_along = 0 if isinstance(layer, LinearLayer) else 1
            for parameter in layer.parameters():
                parameter.cut_into = tensor_parallel if is_cut(parameter) else 1


def replicas(tensor_parallel: int) -> Any:
    """The process group of the ranks that have the same parts of layers; None for all ranks."""
    if tensor_parallel == 1:
        return None
    from deepspeed.utils import groups

    return groups.get_data_parallel_group()


def _check(config: Any, tensor_parallel: int) -> None:
    where = config.name_or_path or config.model_type
    if config.model_type not in ARCHITECTURES:
        raise HpcRlhfError(
            f"tensor_parallel cannot cut the layers of {config.model_type}",
            where=where,
            hint=f"leave it out and use zero: 3, which shards any model; it can cut {', '.join(ARCHITECTURES)}",
        )
    heads = config.num_attention_heads
    sizes = {
        "attention heads": heads,
        "key and value heads": getattr(config, "num_key_value_heads", None) or heads,
        "feed-forward units": getattr(config, "intermediate_size", None) or config.ffn_dim,
    }
    for what, count in sizes.items():
        if count % tensor_parallel:
            raise HpcRlhfError(
                f"its {count} {what} cannot be shared out among tensor_parallel: {tensor_parallel} ranks",
                where=where,
                hint="give tensor_parallel a number that divides it, or leave it out and use zero: 3",
            )


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether this rank has but a part of a parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def along(layer: Any) -> int | None:
    """The dimension of its weight that a layer is cut along: 0 outputs, 1 inputs; None where it is whole."""
    return getattr(layer, "cut_along", None)


def joined(layer: Any, name: str, tensor: Tensor) -> Tensor:
    """A weight or bias of a layer, whole. Collective in the group where the layer is cut.

    Args:
        name: of the layer's parameter.
        tensor: this rank's part of it.
    """
    dim = along(layer)
    if dim is None or (dim == 1 and name == "bias"):
        return tensor
    parts = dist.get_world_size(layer.mp_group)
    found = tensor.new_empty(parts * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(found, tensor.contiguous(), group=layer.mp_group)
    return found if dim == 0 else found.view(parts, *tensor.shape).transpose(0, 1).flatten(1)


def bridge(layer: Any) -> Callable[[Tensor], Tensor] | None:
    """What makes a low-rank update of a layer, cut as the layer is, act as the whole one does.

    It stands between the factors of the update: of outputs cut, the gradient is summed over the group; of inputs cut,
    the products are. None for a layer that is whole.
    """
    dim = along(layer)
    if dim is None:
        return None
    from deepspeed.module_inject.layers import ColumnParallel, RowParallel

    if dim == 0:
        return partial(ColumnParallel.apply, layer.mp_group)

    def summed(products: Tensor) -> Tensor:
        total: Tensor = RowParallel.apply(layer.mp_group, products, False)
        return total

    return summed


def own_part(layer: Any, tensor: Tensor, dim: int) -> Tensor:
    """This rank's part of a tensor that is cut along a dimension as a layer is."""
    parts, place = dist.get_world_size(layer.mp_group), dist.get_rank(layer.mp_group)
    return tensor.chunk(parts, dim)[place].clone()


def mark(part: Tensor) -> None:
    """Tell DeepSpeed that this rank has but a part of a parameter or its gradient, for the gradient's norm."""
    part.tensor_model_parallel = True  # type: ignore[attr-defined]
