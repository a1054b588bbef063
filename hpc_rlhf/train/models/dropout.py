"""Dropout and other noise of training, in a model's configuration and in its modules."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from hpc_rlhf.errors import HpcRlhfError

# Names of dropout rates: attention_dropout, resid_pdrop, hidden_dropout_prob, attn_config.attn_pdrop.
RATE = re.compile(r"dropout|pdrop|drop_rate|drop_prob")
# Noise that is not dropout of activations, which the spec's rate is not for.
OTHER_NOISE = re.compile(r"layer_?drop|drop_path|stochastic_depth|jitter|router_noise")
# Routers that use their jitter rate in evaluation too, as a threshold (Phi-3.5-MoE): they stay in evaluation mode.
_ALWAYS_IN_EVALUATION = {"PhimoeTopKRouter": "router_jitter_noise"}


def set_rates(config: Any, rate: float) -> None:
    """Set every dropout rate of a configuration and of those inside it, in place; other noise goes off."""
    inner = getattr(config, "sub_configs", None) or {}
    fields = config if isinstance(config, dict) else vars(config)
    for name, value in list(fields.items()):
        if name in inner or isinstance(value, dict) or hasattr(value, "to_dict"):
            if value is not None and not name.startswith("_"):
                set_rates(value, rate)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if OTHER_NOISE.search(name) and name not in _ALWAYS_IN_EVALUATION.values():
                _set(config, name, 0.0)
            elif RATE.search(name):
                _set(config, name, rate)


def _set(config: Any, name: str, rate: float) -> None:
    old = config[name] if isinstance(config, dict) else getattr(config, name)
    new = type(old)(rate) if type(old)(rate) == rate else rate  # some fields must be integers
    if isinstance(config, dict):
        config[name] = new
        return
    try:
        setattr(config, name, new)
    except Exception as error:  # transformers validates some configurations
        raise HpcRlhfError(
            f"the model's {name} cannot be {rate} ({type(error).__name__})", where="dropout", hint="set dropout: 0"
        ) from error


def turn_off(model: nn.Module) -> None:
    """Turn off the dropout and noise that modules have been given by other ways than the configuration, in place."""
    for module in model.modules():
        if type(module).__name__ in _ALWAYS_IN_EVALUATION:
            stay = module.eval()
            vars(module)["train"] = lambda mode=True, stay=stay: stay
            continue
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (RATE.search(name) or OTHER_NOISE.search(name)):
                setattr(module, name, 0.0)
