"""Job specs for the tests of the data."""

from __future__ import annotations

from typing import Any

from hpc_rlhf.spec.job import JobSpec


def spec_of(*sources: dict[str, Any], stages: tuple[str, ...] = ("sft", "reward", "ppo"), **data: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "data",
            "run_dir": "run",
            "seed": 3,
            "data": {"sources": list(sources), **data},
            "models": {"actor": {"from_scratch": {"model_type": "llama", "vocab_size": 300}}},
            "stages": {stage: {} for stage in stages},
        }
    )
