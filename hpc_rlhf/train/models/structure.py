"""What a transformers model consists of, where architectures differ in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from hpc_rlhf.spec import sequence_checks


def body(model: Any) -> Any:
    """The model without its head.

    Its ``base_model`` is the model itself where no attribute has the name of the prefix, as in Llama 4's text model.
    """
    from transformers import PreTrainedModel

    if model.base_model is not model:
        return model.base_model
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else model


def layers(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The list of the model's layers, and its name; None if it was not found."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    return None


def layer_kinds(config: Any) -> set[str]:
    """The kinds of layers that a configuration lists; empty if it lists none."""
    text = config.get_text_config()
    return sequence_checks.layer_kinds({field: getattr(text, field, None) for field in sequence_checks.LAYER_KINDS})
