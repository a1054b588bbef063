"""plan, render and submit --dry-run as a user calls them, without Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.cli.submit import next_verbs
from hpc_rlhf.launch.preflight import objections
from hpc_rlhf.run.events import Cancelled, Submitted
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.load import dump_spec, load_spec
from hpc_rlhf.spec.sweep import load_any

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


def test_plan_as_a_table_and_as_json(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[3].split()[:6] == ["ppo", "sft,", "reward", "2", "4", "4"]
    assert main(["plan", str(job), "--json", "--set", "stages.sft.micro_batch=7"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["jobs"][0]["batch"]["global"] == 28


def test_the_verdict_of_a_plan_comes_last(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verdict(*sets: str) -> tuple[int, str, bool | None]:
        words = ["plan", str(job), *(word for each in sets for word in ("--set", each))]
        code, table = main(words), capsys.readouterr().out
        assert main([*words, "--json"]) == code
        return code, table.splitlines()[-1], json.loads(capsys.readouterr().out)["fits"]

    code, last, fits = verdict("slurm.gpu=4G")
    assert (code, fits) == (1, False)
    assert last.startswith("ppo: DOES NOT FIT: an estimated 4.5 of 4.0 GiB on each GPU, at the peak in its passes;")
    code, last, fits = verdict("slurm.gpu=4700M")
    assert (code, last.startswith("ppo: TIGHT: "), fits) == (0, True, True)
    assert verdict("slurm.gpu=a100-80g") == (0, "every stage fits its GPUs", True)
    assert verdict()[0::2] == (0, None)
    code, last, fits = verdict("slurm.gpu=8G", "sweep={stages.ppo.micro_batch: [1, 64]}")
    assert (code, last.startswith("ppo: DOES NOT FIT"), fits) == (1, True, False)  # the second run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("slurm.gpu=4G", "ppo: does not fit: an estimated 4.5 of 4.0 GiB"),
        ("models.actor=nobody/knows-this-900b", "disk: "),
        ("sweep={stages.ppo.micro_batch: [1, 640]}", "ppo: does not fit: "),
    ],
)
def test_submit_refuses_what_does_not_fit_unless_forced(
    job: Path, tmp_path: Path, change: str, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["submit", str(job), "--set", "slurm.gpu=16G", "--set", change]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"\n{message}" in error
    assert "hint: to submit it anyway: --force" in error
    assert list(tmp_path.iterdir()) == [job]
    for option, code in (("--dry-run", 0), ("--force", 2)):
        assert main([*words, option]) == code
        assert f"warning: {message}" in (error := capsys.readouterr().err)
    assert "Slurm's commands are not on PATH" in error


def test_run_warns_of_what_submit_refuses(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(job), "--set", "models.actor=nobody/knows-this-900b", "--hostfile", "/no/such/file"]
    assert main(words) == 2
    warned, error = capsys.readouterr().err.splitlines()[:2]
    assert warned.startswith("warning: disk: ")
    assert error.startswith("error: /no/such/file")


def test_what_helps_after_a_submit(job: Path) -> None:
    spec = load_spec(job)
    assert next_verbs(spec, finished=False) == ("status", "logs -f", "cancel")
    assert next_verbs(spec, finished=True) == ("report", "chat")
    assert next_verbs(load_spec(job, ["stages={reward: {}}"]), finished=True) == ("report",)
    assert next_verbs(load_any(job, ["sweep={seed: [1, 2]}"]), finished=True) == ("compare",)


def test_only_stages_without_a_job_are_checked(job: Path, tmp_path: Path) -> None:
    spec = load_spec(job, ["slurm.gpu=4G"])
    assert [each.where for each in objections(spec) if each.check == "memory"] == ["ppo"]
    ledger = Ledger(RunDir(tmp_path / "my run").ledger)
    ledger.append(Submitted("ppo", token="t", job_id="7"))
    assert not [each for each in objections(spec) if each.check == "memory"]
    ledger.append(Cancelled("ppo", job_id="7"))
    assert [each.where for each in objections(spec) if each.check == "memory"] == ["ppo"]


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
