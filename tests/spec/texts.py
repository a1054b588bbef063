"""A valid spec for the tests to break, and a helper to load broken ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.errors import Problem, SpecError
from hpc_rlhf.spec.load import load_spec

JOBS = Path(__file__).parents[2] / "jobs"

GOOD = """\
name: good
run_dir: runs/good
slurm:
  partition: gpu
  gpus_per_node: 2
  time: "12:00:00"
data:
  sources:
    - {path: Dahoas/rm-static, format: prompt-chosen-rejected}
    - demo: 300
models:
  actor: facebook/opt-125m
  reward:
    from_scratch: {model_type: llama, vocab_size: 512}
stages:
  sft:
    lr: 1e-4
    micro_batch: 4
  reward: {}
  ppo:
    micro_batch: 4
    slurm: {nodes: 2}
"""


def write(folder: Path, text: str | bytes, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems_in(path: Path, *sets: str) -> tuple[Problem, ...]:
    """The problems of an invalid spec."""
    with pytest.raises(SpecError) as caught:
        load_spec(path, sets)
    assert caught.value.problems
    return caught.value.problems
