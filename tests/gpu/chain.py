"""A tiny chain, preempted in SFT and, at full scale, in PPO, resumes to the weights of an undisturbed one."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hpc_rlhf.run.layout import RunDir
from tests.train.stages import log_tail, make_run, run_stage, tiny_spec, weights_digest

STOPS = {"sft": 3, "ppo": 1}


def run(run_dir: RunDir, stage: str, ranks: int, stop_after: int | None = None) -> None:
    codes = run_stage(run_dir, stage, ranks, stop_after)
    if stop_after is None and any(codes):
        raise SystemExit(f"{stage} failed with exit codes {codes}:\n{log_tail(run_dir, stage)}")
    if stop_after is not None and (run_dir.stage(stage).model / "manifest.json").exists():
        raise SystemExit(f"{stage} finished before the preemption reached it")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scale")
    options = parser.parse_args()
    if importlib.util.find_spec("pyarrow") is None:
        raise SystemExit("the stages store their data with pyarrow, which is not installed")
    gpus = torch.cuda.device_count()
    ranks = min(gpus, 4) or 1
    fields: dict[str, dict[str, Any]] = {
        "sft": {"precision": "bf16", "max_steps": 40},
        "reward": {"precision": "bf16"},
        "ppo": {"precision": "bf16", "max_steps": 6, "minibatches": 2},
    }
    if options.scale == "tiny":
        fields = {"sft": fields["sft"]}
    with tempfile.TemporaryDirectory(prefix="gpu-chain-") as folder:
        whole, stopped = (make_run(tiny_spec(Path(folder) / name, ranks, **fields)) for name in ("whole", "stopped"))
        for stage in fields:
            run(whole, stage, ranks)
        for stage in fields:
            if stage not in STOPS:
                shutil.copytree(whole.stage(stage).path, stopped.stage(stage).path, dirs_exist_ok=True)
                continue
            run(stopped, stage, ranks, STOPS[stage])
            run(stopped, stage, ranks)
        different = [stage for stage in fields if weights_digest(whole, stage) != weights_digest(stopped, stage)]
    if different:
        sys.exit(f"after a preemption, the weights differ in {', '.join(different)}")
    backend = "NCCL" if gpus else "gloo"
    print(
        f"preempted in {' and '.join(STOPS.keys() & fields)}, resumed to equal weights; ranks: {ranks}, over {backend}"
    )


if __name__ == "__main__":
    main()
