"""Loads what every rank loads. A process that has imported this can be forked: it has no threads."""

import os
from importlib import import_module

from hpc_rlhf.train.parallel.deepspeed_import import import_deepspeed

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded
import_deepspeed()
for name in (
    "distutils.ccompiler",
    "pandas",
    "torch.utils.tensorboard",
    "transformers.convert_slow_tokenizer",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("gpt2", "llama", "opt", "qwen3")),
    "hpc_rlhf.observe.report.page",
    "hpc_rlhf.train.context",
    "hpc_rlhf.train.entry",
):
    import_module(name)
