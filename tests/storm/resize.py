"""``python -m tests.storm.resize``: cancels each stage of the chain in three dimensions once, resumes it in another
layout of its eight ranks, and compares with a chain that was left alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cluster import Cluster, wait_until
from tests.cluster.chain import Chain
from tests.train.stages import metrics

STEPS = {"pretrain": 30, "sft": 30, "reward": 36, "grpo": 6}
# By the stages that train at a time.
LAYOUTS: tuple[dict[str, dict[str, int]], ...] = (
    {"pretrain": {"pipeline_parallel": 1}},
    {"sft": {"tensor_parallel": 1}, "reward": {"sequence_parallel": 1}},
    {"grpo": {"tensor_parallel": 1, "sequence_parallel": 4}},
)
SECONDS = 1800
# Sums are in another order, and a step makes rounding larger.
TOLERANCE = 1e-3


def main() -> int:
    with (
        tempfile.TemporaryDirectory(prefix="hpc-rlhf-resize-") as name,
        Cluster(Path(name) / "slurm", owner=os.getpid()) as cluster,
    ):
        folder, sets = Path(name), tuple(f"stages.{stage}.max_steps={steps}" for stage, steps in STEPS.items())
        alone = Chain(cluster, Path(__file__).with_name("storm-3d.yaml"), folder / "alone", sets)
        alone.submit()
        alone.wait_done("grpo", SECONDS)
        resized = replace(alone, path=folder / "resized")
        resized.submit()
        for layouts in LAYOUTS:
            for stage in layouts:
                resized.wait_step(stage, STEPS[stage] // 3)
            resized.cli("cancel", resized.path)
            changes = [f"stages.{stage}.{name}={size}" for stage in layouts for name, size in layouts[stage].items()]
            resized = replace(resized, sets=(*resized.sets, *changes))
            # Its ranks save before they end.
            wait_until(partial(try_submit, resized), 120, "the cancelled jobs have ended", every=2)
        resized.wait_done("grpo", SECONDS)
        worst = {stage: differences(alone, resized, stage) for stage in STEPS}
        print(*(f"{stage}: {what}" for stage, what in worst.items()), sep="\n")
        return int(not all(value <= TOLERANCE for what in worst.values() for value in what.values()))


def try_submit(chain: Chain) -> bool:
    return chain.submit(check=False).returncode == 0


def differences(alone: Chain, resized: Chain, stage: str) -> dict[str, float]:
    """The largest relative differences of a loss and of a weight."""
    losses = [
        torch.tensor([row["loss"] for row in metrics(chain.run, stage) if row["kind"] == "train"])
        for chain in (alone, resized)
    ]
    assert len(losses[0]) == len(losses[1]) == STEPS[stage]
    assert len(resized.events("started", stage)) == 2, stage
    weights = [load_file(chain.run.stage(stage).model / "model.safetensors") for chain in (alone, resized)]
    far = [(weights[1][name] - weight).abs().max() / weight.abs().max() for name, weight in weights[0].items()]
    return {"loss": float((losses[1] / losses[0] - 1).abs().max()), "weights": float(max(far))}


if __name__ == "__main__":
    sys.exit(main())
