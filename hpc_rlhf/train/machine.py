"""The software and hardware that a rank runs on.

``python -m hpc_rlhf.train.machine OP…`` prints, as a line of JSON, what torch and DeepSpeed find on this
machine, and whether each DeepSpeed op is built or could be.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hpc_rlhf import __version__

_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "submitit")
_CHECKOUT = Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """The versions that this process runs with, and the commit if hpc-rlhf runs from its own checkout."""
    installed = {"hpc-rlhf": __version__, "commit": _commit(), "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in installed.items() if version}


def _commit() -> str:
    if not (_CHECKOUT / ".git").exists():
        return ""
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return process.stdout.strip()


def process_age() -> float:
    """Seconds since this process began, most of which its imports took; 0 if the system does not provide it."""
    try:
        after_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return 0.0
    return round(max(0.0, age), 3)


def script_age() -> float | None:
    """Seconds since the batch script began, on the same machine; None if unknown."""
    try:
        up = float(Path("/proc/uptime").read_text().split()[0])
        age = up - float(os.environ["HPC_RLHF_SCRIPT_BEGAN"])
    except (OSError, KeyError, ValueError):
        return None
    return age if age >= 0 else None


def devices(ops: list[str]) -> dict[str, Any]:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from hpc_rlhf.train.parallel.deepspeed_import import import_deepspeed

    import_deepspeed()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "gpus": [torch.cuda.get_device_name(number) for number in range(gpus)],
        "bf16": (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if gpus
            else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "deepspeed": deepspeed.__version__,
        "accelerator": get_accelerator().device_name(),
        "ops": {op: _op(op) for op in ops},
    }


def _op(name: str) -> dict[str, Any]:
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    builder = ALL_OPS.get(name)
    return {
        "built": bool(installed_ops.get(name)),
        "possible": builder is not None and bool(builder.is_compatible(verbose=False)),
        "variable": getattr(builder, "BUILD_VAR", ""),
        "cuda": any(base.__name__ == "CUDAOpBuilder" for base in type(builder).__mro__),
    }


if __name__ == "__main__":
    print("\n" + json.dumps(devices(sys.argv[1:])))
