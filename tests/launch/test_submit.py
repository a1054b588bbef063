"""Submitting to a real Slurm: the graph, attaching, crashes, rejections. The jobs never start."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from tests.cluster import Cluster, wait_until

JOB = """
name: demo
run_dir: {run}
slurm: {{partition: gpu, gpus_per_node: 2, time: "10", comment: "it's mine", extra: {{begin: now+1hour}}}}
data: {{sources: [{{demo: 100}}]}}
models: {{actor: {{from_scratch: {{model_type: opt, vocab_size: 300, hidden_size: 16, num_hidden_layers: 1}}}}}}
stages: {{sft: {{}}, reward: {{}}, ppo: {{}}}}
"""


class Bench:
    """A run directory, its job file, and the CLI."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.run = RunDir(folder / "my run")
        self.job = folder / "demo.yaml"
        self.job.write_text(JOB.format(run=self.run.path))

    def cli(self, verb: str, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(verb, *args), env=self.env(environ), capture_output=True, text=True, timeout=60
        )

    def command(self, verb: str, *args: str) -> list[str]:
        return [sys.executable, "-m", "hpc_rlhf.cli", verb, str(self.job), *args]

    def env(self, extra: dict[str, str]) -> dict[str, str]:
        return {**self.cluster.env, **extra}

    def submitted(self) -> dict[str, str]:
        """Each stage's latest job."""
        events = Ledger(self.run.ledger).events()
        return {event.stage: event.job_id for event in events if event.name == "submitted"}

    def names(self) -> list[str]:
        """The names of all stages' jobs that wait or run."""
        names = self.cluster.run("squeue", "--noheader", "--format=%j").stdout.split()
        return sorted(name for name in names if not name.endswith(".sentinel"))

    def wrap_sbatch(self, script: str) -> str:
        """A PATH on which sbatch is a script of ours; $REAL is the real one."""
        real = self.cluster.run("sh", "-c", "command -v sbatch").stdout.strip()
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin/sbatch"
        wrapper.write_text(f"#!/bin/bash\nREAL={real}\ncd {self.folder}\n{script}\n")
        wrapper.chmod(0o755)
        return f"{self.folder}/bin:{os.environ['PATH']}"


@pytest.fixture
def bench(idle_cluster: Cluster, tmp_path: Path) -> Bench:
    return Bench(idle_cluster, tmp_path)


ALL = ["demo.ppo", "demo.reward", "demo.sft"]


def test_graph_is_submitted_with_its_needs_and_tokens(bench: Bench) -> None:
    done = bench.cli("submit")
    assert (done.returncode, bench.names()) == (0, ALL), done.stderr
    ids = bench.submitted()
    assert all(ids[stage] in done.stdout for stage in ("sft", "reward", "ppo"))
    needs = bench.cluster.field(ids["ppo"], "Dependency")
    assert needs == f"afterok:{ids['sft']}(unfulfilled),afterok:{ids['reward']}(unfulfilled)"
    assert bench.cluster.field(ids["sft"], "Dependency") == "(null)"
    comments = bench.cluster.run("squeue", "--noheader", "--format=%k").stdout.splitlines()
    tokens = [event.token for event in Ledger(bench.run.ledger).events() if event.name == "submitting"]
    marks = [(f"hpc-rlhf:{token} it's mine", f"hpc-rlhf-sentinel:{token}") for token in tokens]
    assert sorted(comments) == sorted(mark for both in marks for mark in both)
    assert stat.S_IMODE(bench.run.path.stat().st_mode) == 0o700
    for stage, job_id in ids.items():
        logs = bench.run.stage(stage).logs
        assert (logs / f"{job_id}_submitted.pkl").exists()
        assert (logs / f"{job_id}_submission.sh").read_text() == bench.run.sbatch(stage).read_text()


def test_a_second_submit_attaches(bench: Bench) -> None:
    bench.cli("submit")
    ids = bench.submitted()
    again = bench.cli("submit")
    assert again.returncode == 0
    assert "nothing was submitted" in again.stderr
    assert again.stdout.count("already submitted") == 3
    assert (bench.submitted(), bench.names()) == (ids, ALL)


def test_another_spec_is_refused_while_jobs_live(bench: Bench) -> None:
    bench.cli("submit")
    other = bench.cli("submit", "--set", "stages.sft.lr=0.5")
    assert other.returncode == 2
    assert "stages.sft.lr: 9.65e-06 -> 0.5" in other.stderr
    assert "hpc-rlhf cancel" in other.stderr
    assert bench.names() == ALL


def test_a_finished_stage_is_neither_submitted_nor_waited_for(bench: Bench) -> None:
    bench.cli("submit")
    bench.cli("cancel")
    model = bench.run.stage("sft").model
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    manifest.write(model, {})
    done = bench.cli("submit")
    assert bench.names() == ["demo.ppo", "demo.reward"], done.stderr
    ids = bench.submitted()
    assert bench.cluster.field(ids["ppo"], "Dependency") == f"afterok:{ids['reward']}(unfulfilled)"
    assert "already done" in done.stdout


def test_a_rejection_shows_sbatchs_message_and_leaves_nothing_behind(bench: Bench) -> None:
    done = bench.cli("submit", "--set", "stages.ppo.slurm.partition=nope")
    assert done.returncode == 2
    assert "stages.ppo: sbatch rejected the job: invalid partition specified: nope" in done.stderr
    assert "Traceback" not in done.stderr
    assert "cancelled sft (job " in done.stderr
    assert bench.names() == []
    events = [(event.name, event.stage) for event in Ledger(bench.run.ledger).events()]
    assert events[-3:] == [("refused", "ppo"), ("cancelled", "sft"), ("cancelled", "reward")]
    assert bench.cli("submit").returncode == 0
    assert bench.names() == ALL


def test_a_job_of_a_killed_submit_is_adopted_by_the_next(bench: Bench) -> None:
    kill = '[[ "$*" == *sentinel* ]] || { [ -e once ] && kill -9 $PPID; touch once; }'
    path = bench.wrap_sbatch(f'"$REAL" "$@" >answer; {kill}; cat answer')
    assert bench.cli("submit", PATH=path).returncode == -9
    assert bench.names() == ["demo.reward", "demo.sft"]
    assert sorted(bench.submitted()) == ["sft"]
    done = bench.cli("submit")
    assert (done.returncode, bench.names()) == (0, ALL), done.stderr
    ids = bench.submitted()
    assert f"afterok:{ids['reward']}(unfulfilled)" in bench.cluster.field(ids["ppo"], "Dependency")


def test_a_job_that_slurm_accepted_although_sbatch_failed_is_adopted(bench: Bench) -> None:
    path = bench.wrap_sbatch('"$REAL" "$@" >/dev/null; echo "sbatch: error: Socket timed out" >&2; exit 1')
    done = bench.cli("submit", PATH=path)
    assert (done.returncode, bench.names(), sorted(bench.submitted())) == (0, ALL, ["ppo", "reward", "sft"])


def test_concurrent_submits_create_one_graph(bench: Bench) -> None:
    both = [
        subprocess.Popen(bench.command("submit"), env=bench.env({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=60)[1].decode() for process in both]
    assert bench.names() == ALL
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 0] or (codes == [0, 1] and any("is working on this run" in error for error in errors))


def test_a_resubmitted_stage_releases_its_dependents(bench: Bench) -> None:
    bench.cli("submit")
    before = bench.submitted()
    bench.cluster.run("scancel", before["sft"])
    wait_until(lambda: bench.cluster.field(before["ppo"], "Reason") == "DependencyNeverSatisfied", 120, "PPO is stuck")
    assert "stuck" in bench.cli("status").stdout
    done = bench.cli("submit")
    assert (done.returncode, bench.names()) == (0, ALL), done.stderr
    after = bench.submitted()
    assert after["sft"] != before["sft"]
    assert (after["reward"], after["ppo"]) == (before["reward"], before["ppo"])
    needs = bench.cluster.field(after["ppo"], "Dependency")
    assert needs == f"afterok:{after['sft']}(unfulfilled),afterok:{after['reward']}(unfulfilled)"


def test_variables_of_other_jobs_are_removed(bench: Bench) -> None:
    leaked = {"SBATCH_PARTITION": "low", "SLURM_JOB_ID": "1", "SQUEUE_PARTITION": "low", "SLURM_NTASKS": "9"}
    assert bench.cli("submit", **leaked).returncode == 0
    ids = bench.submitted()
    assert bench.cluster.field(ids["sft"], "Partition") == "gpu"
    assert "nothing was submitted" in bench.cli("submit", **leaked).stderr


def test_cancelled_jobs_stay_cancelled(bench: Bench) -> None:
    bench.cli("submit")
    ids = bench.submitted()
    done = bench.cli("cancel")
    assert all(job_id in done.stdout for job_id in ids.values())
    assert bench.names() == []
    for job_id in ids.values():
        assert bench.cluster.field(job_id, "Requeue") == "0"  # a rank that is told to stop would requeue it
    status: dict[str, Any] = json.loads(bench.cli("status", "--json").stdout)
    assert {stage["state"] for stage in status["stages"]} == {"cancelled"}
    assert "no job of this run" in bench.cli("cancel").stderr


def test_a_copy_leaves_the_jobs_of_the_original_alone(bench: Bench, tmp_path: Path) -> None:
    bench.cli("submit")
    copy = RunDir(Path(shutil.copytree(bench.run.path, tmp_path / "copy")))

    def call(verb: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hpc_rlhf.cli", verb, str(copy.path)]
        return subprocess.run(command, env=bench.env({}), capture_output=True, text=True, timeout=60)

    for verb in ("cancel", "heal"):
        assert call(verb).returncode == 2
    assert call("relocate").returncode == 0
    done = call("cancel")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert bench.names() == ALL


def test_a_moved_run_is_not_adopted_while_it_has_jobs(bench: Bench, tmp_path: Path) -> None:
    bench.cli("submit")
    moved = shutil.move(bench.run.path, tmp_path / "moved")
    command = [sys.executable, "-m", "hpc_rlhf.cli", "relocate", moved]

    def relocate() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=bench.env({}), capture_output=True, text=True, timeout=60)

    refused = relocate()
    assert refused.returncode == 2
    hint = refused.stderr.splitlines()[-1]
    bench.cluster.run(*hint[hint.index("scancel") :].split())
    wait_until(lambda: not bench.names(), 120, "the cancelled jobs to end")
    assert relocate().returncode == 0
