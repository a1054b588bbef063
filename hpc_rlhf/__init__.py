"""hpc-rlhf: RLHF on Slurm clusters, from one YAML file."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
__all__ = ["DeepSpeedGRPOEngine", "DeepSpeedGRPOTrainer", "DeepSpeedPPOTrainer", "DeepSpeedRLHFEngine"]


def __getattr__(name: str) -> object:
    if name in __all__:  # they load torch, which a verb of the login node does without
        return getattr(importlib.import_module("hpc_rlhf.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
