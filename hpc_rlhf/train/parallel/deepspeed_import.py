"""Importing DeepSpeed, and what it supports on this device."""

from __future__ import annotations

import sys


def import_deepspeed() -> None:
    """Import DeepSpeed without MLflow: its autotuner, unused here, would load that and pandas where they are installed,
    which takes each rank a second and 80 MiB."""
    if not {"deepspeed", "mlflow"} & sys.modules.keys():
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # so an import of it raises ImportError
        try:
            import deepspeed  # noqa: F401
        finally:
            del sys.modules["mlflow"]


def supports_fp16() -> bool:
    """True if DeepSpeed can train in float16 on this device; many CPUs cannot."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())
