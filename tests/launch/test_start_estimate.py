"""When Slurm would start a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.submit import predicted_starts
from tests.launch.specs import make_spec


def with_sbatch(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str) -> dict[str, str]:
    """The predicted starts of three stages, with an sbatch that runs these lines and has the script as $2."""
    (folder / "sbatch").write_text(f"#!/bin/bash\n{lines}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return predicted_starts(make_plan(make_spec("/scratch/demo")))


def test_stages_without_needs_have_a_start_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = "sbatch: Job 7 to start at 2026-05-01T09:30:00 using 2 processors on nodes n1 in partition gpu"
    starts = with_sbatch(monkeypatch, tmp_path, f'grep -q "^#SBATCH --job-name" "$2" && echo "{message}" >&2')
    assert starts == {"sft": "would start at 2026-05-01T09:30:00", "reward": "would start at 2026-05-01T09:30:00"}


def test_a_rejection_is_reported_for_one_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    starts = with_sbatch(monkeypatch, tmp_path, 'echo "sbatch: error: invalid partition" >&2; exit 1')
    assert starts == {"sft": "no start time (sbatch --test-only: sbatch: error: invalid partition)"}
