"""Runs a short form of a demo, as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hpc_rlhf.run.layout import RunDir

CHECKOUT = Path(__file__).parents[1]


def short_grpo(folder: Path, *fields: str) -> RunDir:
    """``make demo-grpo`` with nine steps of SFT, no evaluation, and ``stages.grpo`` with some fields changed.

    Args:
        fields: such as ``max_steps=2``.
    """
    run = RunDir(folder / "run")
    grpo = ("global_batch=32", "micro_batch=16", "eval_every=null", *fields)
    changes = ("stages.sft.max_steps=9", *(f"stages.grpo.{each}" for each in grpo), "stages.eval=null")
    sets = [word for each in (f"run_dir={run.path}", *changes) for word in ("--set", each)]
    done = subprocess.run(
        [sys.executable, "-m", "hpc_rlhf.cli", "run", "jobs/tiny-grpo.yaml", *sets],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=1800, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run
