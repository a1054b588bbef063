"""The contract with submitit: it submits our script, and leaves a pickle of the task."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.executor import StageExecutor
from hpc_rlhf.launch.jobs import submission_options
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import render
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.task import StageTask
from tests.launch.specs import make_spec


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put stubs of srun and sbatch on PATH. sbatch's stub records its arguments and environment."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "srun").write_text("#!/bin/sh\n")
    (stubs / "sbatch").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >{stubs}/args\nenv >{stubs}/env\necho "Welcome, job 99 of today"\necho 12\n'
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    return stubs


def send(spec: JobSpec, stage: str, *after: str) -> str:
    plan = make_plan(spec)
    render(plan, plan.run.scripts)
    job = next(job for job in plan.jobs if job.stage == stage)
    return StageExecutor(plan, job, submission_options(job, "t0ken", after)).send()


@pytest.mark.parametrize("container", [None, {"runtime": "pyxis", "image": "x"}])
def test_submitit_submits_the_rendered_script(container: dict[str, str] | None, sbatch: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "my run", {"container": container, "comment": "mine"})
    run = RunDir(Path(spec.run_dir))
    assert send(spec, "ppo", "10", "11") == "12"
    logs = run.stage("ppo").logs
    assert (logs / "12_submission.sh").read_text() == run.sbatch("ppo").read_text()
    args = (sbatch / "args").read_text().splitlines()
    assert args[:3] == ["--parsable", "--comment=hpc-rlhf:t0ken mine", "--dependency=afterok:10:11"]
    with (logs / "12_submitted.pkl").open("rb") as file:
        assert pickle.load(file).function == StageTask(spec.run_dir, "ppo")


def test_sbatch_gets_the_cluster_settings_and_no_variables_of_other_jobs(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_ACCOUNT", "SRUN_CPUS_PER_TASK", "SLURM_CONF", "HOME_OF_MINE"):
        monkeypatch.setenv(name, "x")
    send(make_spec(tmp_path / "run"), "sft")
    names = {line.partition("=")[0] for line in (sbatch / "env").read_text().splitlines()}
    assert {"SLURM_CONF", "HOME_OF_MINE"} <= names
    assert names.isdisjoint({"SLURM_JOB_ID", "SBATCH_ACCOUNT", "SRUN_CPUS_PER_TASK"})


def test_a_rejection_is_reported_once(sbatch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (sbatch / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: No such account' >&2\necho 'sbatch: error: Sorry' >&2\nexit 1\n"
    )
    with pytest.raises(HpcRlhfError, match=r"stages\.sft: sbatch rejected the job: No such account; Sorry"):
        send(make_spec(tmp_path / "run"), "sft")
    assert capfd.readouterr() == ("", "")
