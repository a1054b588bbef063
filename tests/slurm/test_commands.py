"""How Slurm's answers are understood, on a real Slurm."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import submit
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import UNKNOWN_END, record_of
from tests.cluster import Cluster, wait_until

# A step that, when told to stop, asks why, and writes the answer.
STEP = f"""#!/bin/bash
srun {sys.executable} -c '
import os, signal, sys, time
from hpc_rlhf.slurm import commands
def stop(number, frame):
    open(sys.argv[1], "w").write(repr(commands.why_ended(os.environ["SLURM_JOB_ID"], 0)))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(100)
' "$ANSWER"
"""


@pytest.mark.parametrize("why", ["cancelled", "requeued", "time limit", ""])
@pytest.mark.parametrize("partition", ["low", "low-cancel"])
def test_cancellation_preemption_and_time_limit_are_distinguished(
    why: str, partition: str, idle_cluster: Cluster, tmp_path: Path
) -> None:
    script, answer, log = tmp_path / "step.sh", tmp_path / "answer", tmp_path / "log"
    script.write_text(STEP)
    job_id = idle_cluster.sbatch(f"--partition={partition}", f"--output={log}", f"--export=ALL,ANSWER={answer}", script)
    wait_until(lambda: log.exists() and "ready" in log.read_text(), 120, "the step runs")
    if why == "cancelled":
        idle_cluster.run("scancel", job_id)
    elif why == "requeued":
        idle_cluster.run("scontrol", "requeue", job_id)
    elif why == "time limit":
        idle_cluster.run("scontrol", "update", f"job={job_id}", "EndTime=now+1")
    else:
        everything = ("--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        idle_cluster.sbatch("--partition=high", *everything)
    # Slurm looks for jobs out of time twice a minute.
    wait_until(lambda: answer.exists() and answer.read_text(), 120, "the step was told to stop")
    assert answer.read_text() == repr(why)


def test_queue_and_accounting_follow_a_job_to_its_end(idle_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in idle_cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SQUEUE_PARTITION", "low")  # the user's own default must not hide jobs
    odd = "--comment=a | b\nnew line"
    job_id = idle_cluster.sbatch("--job-name=x|y.sft", odd, "--output=/dev/null", "--wrap=sleep 2; exit 3")
    wait_until(lambda: commands.queue()[job_id].state == "RUNNING", 120, "the job runs")
    assert commands.queue()[job_id].live
    wait_until(lambda: not commands.queue()[job_id].live, 120, "the job ends")
    assert commands.queue()[job_id].state == "FAILED"
    wait_until(lambda: commands.accounting([job_id])[job_id].state == "FAILED", 120, "accounting knows")
    assert commands.accounting([job_id])[job_id].exit_code == "3:0"
    assert commands.accounting([]) == {}


def test_slurms_own_message_reaches_the_user(idle_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in idle_cluster.env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HpcRlhfError, match="scontrol requeue: Invalid job id specified"):
        commands.requeue("999999")


@pytest.mark.parametrize(
    "answer", ["12\n", "12;cluster\n", "Welcome\n--> job 99 ...OK\n12\n", "Node 7:\n\n 12 \nGoodbye\n"]
)
def test_the_job_id_is_found_beside_a_banner(answer: str) -> None:
    assert commands.submitted_id(answer) == "12"


@pytest.mark.parametrize("answer", ["", "Welcome, job 99\n"])
def test_an_answer_without_a_job_id_is_an_error(answer: str) -> None:
    with pytest.raises(HpcRlhfError, match="sbatch printed no job id"):
        commands.submitted_id(answer)


@pytest.mark.parametrize(("preempted", "expected"), [("12:00:00", True), ("11:59:59", False), (None, False)])
def test_a_preemption_before_the_last_start_does_not_count(
    preempted: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer Slurm keeps PreemptTime on a job that requeued itself, which would then be requeued for ever."""
    time = f"2026-01-02T{preempted}" if preempted else "None"
    show = f"JobId=7 JobState=RUNNING StartTime=2026-01-02T12:00:00 PreemptTime={time}"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho {json.dumps(show)}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert commands.was_preempted("7") is expected


@pytest.mark.parametrize(
    ("preempted", "state", "exit_code"),
    [
        ("None", UNKNOWN_END, ""),
        ("2026-01-02T11:59:59", UNKNOWN_END, ""),
        ("2026-01-02T12:00:00", "PREEMPTED", "0:0"),
        ("2026-01-02T12:30:00", "PREEMPTED", "0:0"),
    ],
)
def test_a_record_calls_only_an_attempt_preempted_that_was(preempted: str, state: str, exit_code: str) -> None:
    fields = {
        **{"JobState": "PREEMPTED", "Restarts": "1", "ExitCode": "0:0", "Requeue": "1"},
        **{"StartTime": "2026-01-02T12:00:00", "PreemptTime": preempted},
    }
    record = record_of("7", fields)
    assert (record.state, record.exit_code, record.requeueable) == (state, exit_code, True)


@pytest.mark.parametrize(
    ("run_time", "limit", "expected"),
    [
        ("00:01:00", "00:10:00", "cancelled"),
        ("00:10:03", "00:10:00", "time limit"),
        ("1-00:00:00", "UNLIMITED", "cancelled"),
    ],
)
def test_a_job_at_its_time_limit_was_not_cancelled(
    run_time: str, limit: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = f"JobId=7 JobState=COMPLETING RunTime={run_time} TimeLimit={limit} PreemptTime=None"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho {json.dumps(show)}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert commands.why_ended("7", 0) == expected


# Slurm agrees to a requeue and ends the step, the command that asked for it too.
REQUEUES = """#!/usr/bin/python3
import os, signal, sys
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGUSR2)
open(sys.argv[0] + ".done", "w").write(" ".join(sys.argv[1:]))
"""


def test_a_command_survives_the_signals_that_it_causes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(REQUEUES.replace("/usr/bin/python3", sys.executable))
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    received: list[int] = []
    kept = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        commands.requeue("7")
        assert (tmp_path / "scontrol.done").read_text() == "requeue 7"
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM], "signals are unblocked again"
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_a_jobs_start_and_end_are_by_the_controllers_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = "JobId=7 JobState=RUNNING StartTime=2026-01-01T10:00:00 EndTime=2026-01-01T10:30:00"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho {json.dumps(show)}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    start, end = commands.start_and_end("7")
    assert end - start == 1800
    monkeypatch.setenv("SLURM_JOB_START_TIME", "100")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "160")
    assert commands.start_and_end("7") == (100.0, 160.0)


def test_slurm_predicts_when_a_script_would_start(
    idle_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(idle_cluster.conf))
    monkeypatch.setattr(submit, "SOON", 60)  # this machine may be slow
    before, script = set(commands.queue()), tmp_path / "script"
    script.write_text("#!/bin/bash\n#SBATCH --partition=low\nsleep 1\n")
    start = submit.predicted_start(script)
    assert start is not None
    assert abs(time.mktime(time.strptime(start, "%Y-%m-%dT%H:%M:%S")) - time.time()) < 86400
    script.write_text("#!/bin/bash\n#SBATCH --partition=nowhere\n")
    with pytest.raises(HpcRlhfError, match="invalid partition"):
        submit.predicted_start(script)
    assert set(commands.queue()) <= before
