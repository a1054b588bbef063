"""Small job specs for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_rlhf.spec.job import JobSpec


def make_spec(run_dir: Path | str, slurm: dict[str, Any] | None = None, **stages: dict[str, Any]) -> JobSpec:
    """A spec; by default with three stages of two ranks each."""
    return JobSpec.model_validate(
        {
            "name": "demo",
            "run_dir": str(run_dir),
            "slurm": {"gpus_per_node": 2, **(slurm or {})},
            "data": {"sources": [{"demo": 100}]},
            "models": {"actor": "facebook/opt-125m"},
            "stages": stages or {"sft": {}, "reward": {}, "ppo": {}},
        }
    )
