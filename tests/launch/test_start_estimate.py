"""When Slurm thinks that a run would start."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.start_estimate import predicted_starts
from tests.launch.specs import make_spec


def with_sbatch(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str) -> dict[str, str]:
    """What is predicted of three stages by an sbatch that runs these lines, with the script as $2."""
    (folder / "sbatch").write_text(f"#!/bin/bash\n{lines}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return predicted_starts(make_plan(make_spec("/scratch/demo")))


def test_stages_that_wait_for_no_other_have_a_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "sbatch: Job 7 to start at 2026-05-01T09:30:00 using 2 processors on nodes n1 in partition gpu"
    told = with_sbatch(monkeypatch, tmp_path, f'grep -q "^#SBATCH --job-name" "$2" && echo "{said}" >&2')
    assert told == {
        "sft": "would start at 2026-05-01T09:30:00",
        "reward": "would start at 2026-05-01T09:30:00",
    }


def test_what_slurm_has_against_it_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = with_sbatch(monkeypatch, tmp_path, 'echo "sbatch: error: invalid partition" >&2; exit 1')
    assert told == {"sft": "no start time (sbatch --test-only: sbatch: error: invalid partition)"}
