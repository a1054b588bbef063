"""plan, render and submit --dry-run as a user calls them, without Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import dump_spec, load_spec

JOB = """
name: demo
run_dir: {run}
slurm: {{partition: gpu, gpus_per_node: 2, nodes: 2}}
data: {{sources: [{{demo: 100}}]}}
models: {{actor: facebook/opt-125m}}
stages: {{sft: {{}}, reward: {{}}, ppo: {{}}}}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(JOB.format(run=tmp_path / "my run"))
    return path


def cli(*args: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_rlhf.cli", *map(str, args)]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True)


def test_plan_as_a_table_and_as_json(job: Path) -> None:
    table = cli("plan", job).stdout.splitlines()
    assert table[3].split()[:6] == ["ppo", "sft,", "reward", "2", "4", "4"]
    plan = json.loads(cli("plan", job, "--json", "--set", "stages.sft.micro_batch=7").stdout)
    assert plan["jobs"][0]["batch"]["global"] == 28


def test_render_prints_the_files_it_writes(job: Path, tmp_path: Path) -> None:
    done = cli("render", job, "--out", tmp_path / "out dir")
    names = done.stdout.splitlines()
    assert len(names) == 15
    assert all(Path(name).is_file() for name in names)


def test_render_to_a_file_is_a_user_error(job: Path, tmp_path: Path) -> None:
    done = cli("render", job, "--out", job / "below")
    assert (done.returncode, done.stderr) == (2, f"error: {job}/below: cannot write: Not a directory\n")


def test_dry_run_shows_commands_without_slurm_or_writes(job: Path, tmp_path: Path) -> None:
    done = cli("submit", "--dry-run", job, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert f"sbatch '--comment=hpc-rlhf:<token>' '{tmp_path}/my run/scripts/sft.sbatch'" in done.stdout
    assert "'--dependency=afterok:<sft>:<reward>'" in done.stdout
    assert list(tmp_path.iterdir()) == [job]


def test_dry_run_refuses_what_submit_would(job: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my run")
    run.stage("sft").checkpoints.mkdir(parents=True)
    run.job_yaml.write_text(dump_spec(load_spec(job)))
    assert cli("submit", "--dry-run", job).returncode == 0
    done = cli("submit", "--dry-run", job, "--set", "stages.sft.lr=0.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert "stages.sft.lr: 9.65e-06 -> 0.5" in done.stderr


def test_submit_without_slurm_points_to_run(job: Path, tmp_path: Path) -> None:
    done = cli("submit", job, PATH="/nowhere")
    assert done.returncode == 2
    assert "hpc-rlhf run" in done.stderr
    assert list(tmp_path.iterdir()) == [job]


def test_submit_without_a_controller_leaves_nothing_behind(job: Path, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        (commands / name).write_text("#!/bin/sh\necho 'no controller' >&2\nexit 1\n")
        (commands / name).chmod(0o755)
    done = cli("submit", job, PATH=f"{commands}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "Slurm does not answer: squeue --me: no controller" in done.stderr
    assert "hpc-rlhf run" in done.stderr
    assert sorted(tmp_path.iterdir()) == [commands, job]


def test_broken_template_is_found_before_anything_is_written(job: Path, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/stage.sbatch.j2").write_text("{{ nothing }}")
    done = cli("submit", "--dry-run", job)
    assert done.returncode == 2
    assert "'nothing' is undefined" in done.stderr
    assert not (tmp_path / "my run").exists()
