"""hpc-rlhf: RLHF on Slurm clusters, from one YAML file."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
__all__ = ["DeepSpeedGRPOEngine", "DeepSpeedGRPOTrainer", "DeepSpeedPPOTrainer", "DeepSpeedRLHFEngine", "open_run"]


def __getattr__(name: str) -> object:
    if name in __all__:  # imported when used: the engines load torch, which a verb of the login node does without
        module = "hpc_rlhf.observe.notebook" if name == "open_run" else "hpc_rlhf.api"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
