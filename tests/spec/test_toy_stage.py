"""A stage added by the diff in CONTRIBUTING.md works in every command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, snippets

JOB = """\
name: toy
run_dir: run
slurm: {gpus_per_node: 0, ranks_per_node: 2}
data: {sources: [{demo: 100}]}
models:
  actor:
    from_scratch:
      {model_type: llama, vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
stages:
  shrink: {max_steps: 3, precision: fp32}
"""  # noqa: E501


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the package with the toy stage, and a job that uses it."""
    for folder in ("hpc_rlhf", "templates"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = (snippet for snippet in snippets(ROOT / "CONTRIBUTING.md") if snippet.language == "diff")
    subprocess.run(["patch", "-p1", "--fuzz=0"], input=f"{diff.text}\n", text=True, cwd=tmp_path, check=True)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def hpc_rlhf(folder: Path, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hpc_rlhf.cli", *args], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(folder)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.train
def test_a_stage_added_by_the_documented_diff_works_in_every_command(extended: Path) -> None:
    hpc_rlhf(extended, "check", "job.yaml")
    (planned,) = json.loads(hpc_rlhf(extended, "plan", "job.yaml", "--json"))["jobs"]
    assert planned["stage"] == "shrink"
    assert "norm" in hpc_rlhf(extended, "run", "job.yaml")
    (stage,) = json.loads(hpc_rlhf(extended, "status", "run", "--json"))["stages"]
    assert (stage["state"], stage["step"]) == ("done", 3)
    assert list(stage["numbers"]) == ["norm"]
    hpc_rlhf(extended, "report", "run")
    assert "Shrinking is done: norm" in (extended / "run" / "report.html").read_text()
