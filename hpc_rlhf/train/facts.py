"""``python -m hpc_rlhf.train.facts OP…``: print, as a line of JSON, what torch and DeepSpeed find on this machine, and of
each DeepSpeed op whether it is built already or could be."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def facts(ops: list[str]) -> dict[str, Any]:
    """What a rank would find here."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "gpus": [torch.cuda.get_device_name(number) for number in range(gpus)],
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if gpus else True,
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
    answer = facts(sys.argv[1:])
    print("\n" + json.dumps(answer))
