"""Becomes a server of ``server.Server`` in vLLM's own Python, and ends when the rank does that started it.

Arguments: that Python, and the descriptors of the connection and of the memory for weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hpc_rlhf.train.rollout.vllm import inside
from hpc_rlhf.train.runtime import keeper

# A rank's variables by which vLLM would look for other ranks, and secrets that it has no use for.
_OF_RANKS = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VIRTUAL_ENV", "PYTHONHOME",
    "HF_TOKEN", "WANDB_API_KEY",
})  # fmt: skip


def main() -> None:
    python, *descriptors = sys.argv[1:]
    program = Path(inside.__file__).with_name("hpc_rlhf_vllm.py")
    keeper.continue_in_child(*map(int, descriptors))
    settings = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONSAFEPATH": "1", "PYTHONPATH": str(program.parent),
    }  # fmt: skip
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    for descriptor in descriptors:
        os.set_inheritable(int(descriptor), True)
    os.execve(python, [python, "-u", "-P", str(program), *descriptors], {**defaults, **kept, **settings})


if __name__ == "__main__":
    main()
