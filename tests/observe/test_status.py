"""status: the state of each stage from Slurm and from disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.observe.gather import Evidence
from hpc_rlhf.observe.metrics import MetricsReader, Row, seconds_per_step
from hpc_rlhf.observe.status import judge, read_status
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Cancelled, Resumed, Started, Submitted
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm.jobs import JobRecord, QueuedJob
from tests.launch.specs import make_spec
from tests.ledger_events import event


def queued(state: str, reason: str = "") -> QueuedJob:
    return QueuedJob("7", "demo.ppo", state, reason, "")


def evidence(*events: str, **known: Any) -> Evidence:
    facts: dict[str, Any] = {"done": False, "needs": ("sft", "reward"), "queued": None, "past": None}
    history = StageHistory([event(name, message=f"why it {name}", step=7) for name in events])
    return Evidence(**{**facts, "job_id": None, "launcher_active": False, "history": history, **known})


@pytest.mark.parametrize(
    ("known", "state", "why"),
    [
        (evidence(), "not started", ""),
        (evidence("failed", done=True, queued=queued("FAILED")), "done", ""),
        (evidence("submitted", queued=queued("PENDING", "Dependency")), "waiting", "for sft and reward"),
        (evidence("submitted", queued=queued("PENDING", "Priority")), "pending", "Priority: other jobs have"),
        (
            evidence("submitted", queued=queued("PENDING", "launch failed requeued held")),
            "held",
            "launch failed requeued held: a node failed to launch it; to release it, run hpc-rlhf heal",
        ),
        (
            evidence("submitted", "ended", "retried", queued=queued("REQUEUE_HOLD", "launch_failed_requeued_held")),
            "held",
            "launch_failed_requeued_held: a node failed to launch it",
        ),
        (evidence("submitted", "started", queued=queued("REQUEUE_HOLD", "")), "held", "Slurm requeued it and holds it"),
        (
            evidence("submitted", queued=queued("SPECIAL_EXIT", "job requeued in held state")),
            "held",
            "job requeued in held state: requeued by hand and held; to release it: scontrol release",
        ),
        (evidence("submitted", queued=queued("PENDING", "JobHeldUser")), "held", "JobHeldUser: held by its owner"),
        (evidence("submitted", queued=queued("PENDING", "QOSMaxJobs")), "pending", "QOSMaxJobs"),
        (evidence("submitted", queued=queued("PENDING", "DependencyNeverSatisfied")), "stuck", "hpc-rlhf heal"),
        (evidence("started", "requeued", queued=queued("PENDING", "BeginTime")), "requeued", "BeginTime: "),
        (evidence("submitted", queued=queued("RUNNING")), "starting", ""),
        (evidence("started", "requeued", queued=queued("RUNNING")), "starting", ""),
        (evidence("started", "resumed", queued=queued("RUNNING")), "running", "resuming from step 7"),
        (evidence("started", queued=queued("RUNNING")), "running", "loading data and model"),
        (evidence("started", "ready", queued=queued("RUNNING")), "running", ""),
        (evidence("started", queued=queued("SUSPENDED")), "suspended", ""),
        (evidence("started", "failed", queued=queued("FAILED"), job_id="7"), "failed", "why it failed"),
        (evidence("started", "cancelled", "saved", "requeued", queued=queued("CANCELLED")), "cancelled", ""),
        (evidence("refused"), "refused", "why it refused"),
        (
            evidence("started", "failed", "ended", "stopped", queued=queued("FAILED")),
            "stopped",
            "why it stopped; fix the cause, then run hpc-rlhf heal",
        ),
        (
            evidence("started", "ended", "retried", queued=queued("PENDING", "BeginTime")),
            "requeued",
            "retry after why it ended",
        ),
        (evidence("started", "ended", "retried", queued=queued("RUNNING")), "starting", ""),
        (evidence("started", "cancelled", "ended", "stopped", queued=queued("CANCELLED")), "cancelled", ""),
        (evidence("started", "interrupted"), "interrupted", "run it again"),
        (evidence("started", queued=queued("TIMEOUT"), job_id="7"), "failed", "Slurm reports TIMEOUT"),
        (evidence("started", past=JobRecord("7", "NODE_FAIL", "0:0"), job_id="7"), "failed", "NODE_FAIL"),
        (evidence("started", past=JobRecord("7", "CANCELLED", "0:0"), job_id="7"), "cancelled", ""),
        (evidence("started", past=JobRecord("7", "COMPLETED", "0:0"), job_id="7"), "failed", "COMPLETED"),
        (evidence("submitted", past=JobRecord("7", "PENDING", "0:0"), job_id="7"), "unknown", "no job 7"),
        (evidence("submitted", job_id="7"), "unknown", "no job 7"),
        (evidence("submitting"), "unknown", "run it again to find the job"),
        (evidence("started", launcher_active=True), "running", ""),
        (evidence("started"), "stopped", "run it again"),
    ],
)
def test_state_and_why(known: Evidence, state: str, why: str) -> None:
    judged = judge(known)
    assert judged[0] == state
    assert why in judged[1]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose SFT is done, whose reward model has some steps, and whose PPO has not started."""
    spec = make_spec(tmp_path / "run")
    run = RunDir(Path(spec.run_dir))
    for stage in spec.stage_names:
        run.stage(stage).logs.mkdir(parents=True)
    run.plan_json.write_text(make_plan(spec).to_json())
    run.job_yaml.write_text("")
    ledger = Ledger(run.ledger)
    for stage in ("sft", "reward"):
        ledger.append(Started(stage, attempt="1", restart=0))
    ledger.append(Resumed("reward", attempt="2", step=40))
    ledger.append(Started("reward", attempt="2", restart=1))
    run.stage("sft").model.mkdir()
    (run.stage("sft").model / "config.json").write_text("{}")
    manifest.write(run.stage("sft").model, {"step": 9})
    rows = [
        {"step": step, "total_steps": 90, "time": 1.0 * step, "kind": "train", "loss": 1 / step} for step in (1, 50)
    ]
    rows.append({"step": 50, "total_steps": 90, "time": 51.0, "kind": "eval", "accuracy": 0.5})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 51, "tot'
    run.stage("reward").metrics.write_text(text)
    return run


def test_status_reads_progress_from_disk_alone(run: RunDir) -> None:
    sft, reward, ppo = read_status(run)
    assert (sft.state, sft.attempts) == ("done", 1)
    assert (reward.state, reward.attempts, reward.step, reward.total_steps) == ("stopped", 2, 50, 90)
    assert (reward.metric, reward.value, reward.updated) == ("loss", 0.02, 50.0)
    assert (reward.held_out, ppo.held_out) == ({"step": 50, "accuracy": 0.5}, {})
    assert (reward.numbers, reward.left) == ({"loss": 0.02}, 40.0)  # a second a step so far
    assert (ppo.state, ppo.step, ppo.value) == ("not started", None, None)


def test_local_run_after_a_cancelled_job_has_no_slurm_job(run: RunDir) -> None:
    ledger = Ledger(run.ledger)
    ledger.append(Submitted("ppo", token="t", job_id="12"))
    ledger.append(Cancelled("ppo", job_id="12"))
    ledger.append(Started("ppo", attempt="local-1", job_id=None, restart=0))
    ppo = read_status(run)[2]
    assert (ppo.job_id, ppo.state) == (None, "stopped")
    run.submit_lock.touch()  # as a launcher does
    assert read_status(run)[2].state == "running"


def test_pace_excludes_time_between_attempts() -> None:
    times = [10.0, 12.0, 14.0, 1000.0, 1002.0]  # an attempt began at 900
    rows = [Row(step, 9, time, {}) for step, time in enumerate(times, 1)]
    assert seconds_per_step(rows, starts=[5.0, 900.0]) == 2.0
    assert seconds_per_step(rows[2:4], starts=[900.0]) is None
    assert seconds_per_step(rows[:1]) is None
    slow_then_quick = [Row(step, 250, 100.0 * step, {}) for step in range(50)]
    slow_then_quick += [Row(50 + step, 250, 5000.0 + step, {}) for step in range(200)]
    assert seconds_per_step(slow_then_quick) == 1.0


def test_metrics_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {"step": 1, "total_steps": 9, "time": 1.0, "kind": "train", "loss": None}
    path.write_text(json.dumps(row) + '\n{"step": 2, "ti')
    reader = MetricsReader(path, "sft")
    assert reader.read_new() == ([Row(1, 9, 1.0, {"loss": None})], [], True)
    assert reader.read_new() == ([], [], False)
    with path.open("a") as file:
        file.write('me": 2.0, "kind": "train"}\n')
    assert [row.step for row in reader.read_new()[0]] == [2]
    with path.open("a") as file:
        file.write(json.dumps({**row, "step": 2, "kind": "eval", "best_step": 2}) + "\n")
    assert reader.read_new() == ([], [Row(2, 9, 1.0, {"loss": None, "best_step": 2})], False)


def test_incomplete_model_is_not_done(run: RunDir) -> None:
    (run.stage("sft").model / "config.json").write_text("longer than it was")
    assert read_status(run)[0].state != "done"


def test_status_verb_without_slurm(run: RunDir, tmp_path: Path) -> None:
    """The status of a submitted run can be read without Slurm, and reports that."""
    Ledger(run.ledger).append(Submitted("ppo", token="t", job_id="12"))

    def status(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hpc_rlhf.cli", "status", str(run.path), *args]
        environ = {**os.environ, "PATH": str(tmp_path)}
        return subprocess.run(command, env=environ, capture_output=True, text=True)

    table = status()
    assert table.returncode == 0
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["stage", "state", "progress", "time", "last", "attempts", "job"]
    assert lines[2].split() == ["reward", "stopped", "50/90", "55%", "40", "s", "left", "loss", "0.02", "2", "-"]
    assert lines[3].split() == ["ppo", "unknown", "-", "-", "-", "-", "12"]
    assert "ppo     Slurm does not answer (squeue is not on PATH)" in lines
    stages = json.loads(status("--json").stdout)["stages"]
    assert [stage["state"] for stage in stages] == ["done", "stopped", "unknown"]


def test_status_verb_shows_interruptions_and_goodput(run: RunDir) -> None:
    for line in (
        {"time": 10, "event": "started", "attempt": "1", "age": 0},
        {"time": 20, "event": "ready", "attempt": "1", "step": 0},
        {"time": 25, "event": "ended", "reason": "node failure", "job_id": "7", "seen": 24, "node": "node2"},
        {"time": 30, "event": "started", "attempt": "2", "age": 0},
        {"time": 40, "event": "ready", "attempt": "2", "step": 0},
        {"time": 100, "event": "finished", "attempt": "2", "step": 9},
    ):
        with run.ledger.open("w" if line["time"] == 10 else "a") as file:
            file.write(json.dumps({**line, "stage": "sft"}) + "\n")
    command = [sys.executable, "-m", "hpc_rlhf.cli", "status", str(run.path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[4] == ""
    assert lines[5].startswith("sft  1 interruption: node failure; latest: node failure at step 0 on node2, ")
    assert lines[6:] == [
        "ppo  runs after sft and reward",
        "",
        "ETTR 0.71 of 1 min 24 s in the allocation: productive 1 min 0 s, starting 20 s, lost 4 s, "
        "saving 0 s; outside it: queued 6 s, waiting 0 s",
    ]
    status = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    sft = status["stages"][0]["goodput"]
    assert sft.pop("interruptions") == [
        {"reason": "node failure", "time": 24, "node": "node2", "step": 0, "lost": 4, "starting": 10}
    ]
    assert sft == {
        "waiting": 0, "queued": 6, "starting": 20, "productive": 60, "lost": 4, "saving": 0, "wall": 90,
        "ettr": 0.7143,
    }  # fmt: skip
    assert status["goodput"] == {**sft, "interruptions": status["goodput"]["interruptions"]}
    assert status["stages"][2]["goodput"]["ettr"] is None


def test_status_of_another_folder_is_one_clear_error(tmp_path: Path) -> None:
    for argument, expected in ((tmp_path, "it has no job.yaml"), (tmp_path / "no", "does not exist")):
        command = [sys.executable, "-m", "hpc_rlhf.cli", "status", str(argument)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_unreadable_plan_is_one_clear_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.job_yaml.write_text("")
    with pytest.raises(HpcRlhfError, match="cannot read the plan: No such file"):
        read_status(run)
    run.plan_json.write_text("")
    with pytest.raises(HpcRlhfError, match="cannot read the plan: it is damaged"):
        read_status(run)
