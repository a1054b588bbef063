"""Finding, reading and following the newest log of a stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe import logs
from hpc_rlhf.observe.logs import LogReader, StageWatch, has_log_to_come, latest_stage
from hpc_rlhf.run.events import (
    Cancelled,
    Ended,
    Failed,
    Finished,
    Requeued,
    Retried,
    RetryRequested,
    Started,
    Stopped,
    Submitted,
    Submitting,
)
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import QueuedJob


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.job_yaml.write_text("")
    for stage in ("sft", "ppo"):
        run.stage(stage).logs.mkdir(parents=True)
    return run


def write(run: RunDir, stage: str, name: str, text: str, age: float = 0) -> None:
    path = run.stage(stage).logs / name
    with path.open("a") as file:
        file.write(text)
    os.utime(path, (time.time() - age, time.time() - age))


def test_the_newest_jobs_log_of_the_requested_rank_is_read(run: RunDir) -> None:
    write(run, "sft", "99_0_log.out", "old\n", age=100)
    write(run, "sft", "100_batch.log", "batch\n", age=50)
    write(run, "sft", "100_0_log.out", "zero\n", age=50)
    write(run, "sft", "100_1_log.out", "one\n", age=20)
    write(run, "sft", "100_0_log.err", "", age=50)
    read = [(path.name if path else None, text) for path, text in LogReader(run, "sft").read()]
    assert read == [("100_batch.log", "batch\n"), ("100_0_log.out", "zero\n")]
    assert [text for _, text in LogReader(run, "sft", rank=1).read()] == ["batch\n", "one\n"]


def test_the_default_is_the_stage_with_the_newest_log(run: RunDir) -> None:
    with pytest.raises(HpcRlhfError, match="no stage has a log yet"):
        latest_stage(run)
    write(run, "ppo", "2_0_log.out", "x", age=10)
    write(run, "sft", "1_0_log.err", "x", age=5)
    assert latest_stage(run) == "sft"


def test_a_missing_stage_and_a_missing_log_are_different_errors(run: RunDir) -> None:
    with pytest.raises(HpcRlhfError, match="the run has no stage reward"):
        LogReader(run, "reward")
    with pytest.raises(HpcRlhfError, match=r"the run has no stage \.\./stages/ppo"):
        LogReader(run, "../stages/ppo")
    with pytest.raises(HpcRlhfError, match="stage ppo has no log of rank 0 yet"):
        list(LogReader(run, "ppo").read())


def test_follow_continues_across_a_requeue_and_a_new_job_until_the_stage_ends(run: RunDir) -> None:
    write(run, "sft", "5_0_log.out", "step 1\n")
    command = [sys.executable, "-u", "-m", "hpc_rlhf.cli", "logs", "-f", str(run.path), "sft"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "step 1\n"
        Ledger(run.ledger).append(Requeued("sft"))
        write(run, "sft", "5_0_log.out", "step 2\n")  # requeued: the same file goes on
        assert follower.stdout.readline() == "step 2\n"
        write(run, "sft", "6_0_log.out", "step 3 ü\n", age=-1)
        assert follower.stdout.readline() == "step 3 ü\n"
        write(run, "sft", "6_0_log.out", "last words\n", age=-2)
        Ledger(run.ledger).append(Finished("sft"))
        assert follower.stdout.read() == "last words\n"
        assert follower.wait(10) == 0


def test_follow_waits_for_the_first_log(run: RunDir) -> None:
    command = [sys.executable, "-u", "-m", "hpc_rlhf.cli", "logs", "-f", str(run.path)]
    assert subprocess.run(command, capture_output=True).returncode == 1  # nothing was submitted
    Ledger(run.ledger).append(Submitted("sft", token="t", job_id="5"))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert follower.stderr.readline() == "no stage has a log yet; waiting for the first\n"
        write(run, "sft", "5_0_log.out", "step 1\n")
        assert follower.stdout.readline() == "step 1\n"
        Ledger(run.ledger).append(Finished("sft"))
        assert follower.wait(10) == 0
    (run.stage("sft").logs / "5_0_log.out").unlink()
    Ledger(run.ledger).append(Cancelled("sft", job_id="5"))
    assert subprocess.run(command, capture_output=True).returncode == 1  # it ended without a log


class FakeSlurm:
    """Answers as a test prescribes, and runs the test's next step whenever the follower sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: dict[str, QueuedJob] = {}
        self.away = False
        self.moves: list[Callable[[], object]] = []
        monkeypatch.setattr(commands, "available", lambda: True)
        monkeypatch.setattr(commands, "queue", self.queue)
        monkeypatch.setattr(logs.time, "sleep", lambda seconds: self.moves.pop(0)())
        monkeypatch.setattr(logs, "SLURM_EVERY", 0.0)

    def queue(self) -> dict[str, QueuedJob]:
        if self.away:
            raise HpcRlhfError("squeue: unable to contact slurm controller")
        return self.jobs

    def show(self, stage: str = "", sentinel: str = "") -> None:
        """The states of job 5, which is the stage's, and of its sentinel."""
        job = QueuedJob("5", "demo.sft", stage, "", "hpc-rlhf:t")
        guard = QueuedJob("9", "demo.sentinel", sentinel, "", "hpc-rlhf-sentinel:t")
        self.jobs = {job.job_id: job for job in (job, guard) if job.state}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(monkeypatch)


def followed(run: RunDir) -> list[str]:
    return [text for _, text in LogReader(run, "sft").follow()]


def test_follow_continues_while_a_sentinel_may_retry(run: RunDir, fake: FakeSlurm) -> None:
    note = Ledger(run.ledger).append

    def fails() -> None:
        note(Failed("sft", message="gloo"))
        fake.show("COMPLETING", "PENDING")

    def is_healed() -> None:
        note(Ended("sft", reason="NCCL or gloo error", message="gloo"))
        note(Retried("sft", job_id="5"))
        fake.show("PENDING", "PENDING")

    def goes_on() -> None:
        note(Started("sft", job_id="5"))
        write(run, "sft", "5_0_log.out", "second\n")
        fake.show("RUNNING", "PENDING")

    def goes_away() -> None:
        note(Failed("sft", message="gloo"))
        fake.away = True

    def is_sent_anew() -> None:
        fake.away = False
        note(Ended("sft", reason="killed", message=""))
        note(Submitting("sft", token="u", by="heal"))
        note(Submitted("sft", token="u", job_id="6"))
        note(Retried("sft", job_id="6"))
        write(run, "sft", "6_0_log.out", "third\n", age=-1)
        fake.jobs = {"6": QueuedJob("6", "demo.sft", "RUNNING", "", "hpc-rlhf:u")}

    def is_left_to_a_person() -> None:
        write(run, "sft", "6_0_log.out", "last words\n", age=-2)
        note(Failed("sft", message="gloo"))
        note(Ended("sft", reason="NCCL or gloo error", message="gloo"))
        note(Stopped("sft", message="two attempts in a row saved no new step"))

    note(Submitted("sft", token="t", job_id="5"))
    note(Started("sft", job_id="5"))
    write(run, "sft", "5_0_log.out", "first\n")
    fake.show("RUNNING", "PENDING")
    fake.moves = [
        fails,
        lambda: fake.show("FAILED", "PENDING"),
        lambda: fake.show("FAILED", "RUNNING"),
        is_healed,
        goes_on,
        goes_away,
        is_sent_anew,
        is_left_to_a_person,
    ]
    assert followed(run) == ["first\n", "second\n", "third\n", "last words\n"]
    assert not fake.moves


def test_follow_ends_if_nothing_will_retry(run: RunDir, fake: FakeSlurm) -> None:
    note = Ledger(run.ledger).append
    write(run, "sft", "5_0_log.out", "first\n")
    note(Started("sft", job_id=None))
    note(Failed("sft", message="no such data"))
    assert followed(run) == ["first\n"]  # without Slurm, and its launcher has ended
    note(Submitted("sft", token="t", job_id="5"))
    note(Started("sft", job_id="5"))
    fake.show("TIMEOUT")
    assert followed(run) == ["first\n"]  # it has no sentinel, and left no word
    note(Failed("sft", message="gloo"))
    fake.show("FAILED", "CANCELLED")
    assert followed(run) == ["first\n"]
    fake.jobs = {"5": QueuedJob("5", "somebody.elses", "RUNNING", "", "")}
    assert followed(run) == ["first\n"]
    fake.show("FAILED", "PENDING")
    note(Cancelled("sft", job_id="5"))
    assert followed(run) == ["first\n"]


def test_follow_continues_while_the_launcher_waits_to_retry(run: RunDir, fake: FakeSlurm) -> None:
    note = Ledger(run.ledger).append
    write(run, "sft", "local_0_log.out", "first\n")
    note(Started("sft", job_id=None))
    note(Failed("sft", message="gloo"))
    note(Ended("sft", reason="NCCL or gloo error", message="gloo"))
    run.submit_lock.write_text("held")

    def gives_up() -> None:
        note(Started("sft", job_id=None))
        write(run, "sft", "local_0_log.out", "second\n")
        note(Failed("sft", message="gloo"))
        run.submit_lock.unlink()

    fake.moves = [lambda: note(Retried("sft", delay=60)), gives_up]
    assert followed(run) == ["first\n", "second\n"]
    assert not fake.moves


def test_an_event_written_while_slurm_is_asked_is_noticed(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = Ledger(run.ledger).append
    note(Submitted("sft", token="t", job_id="5"))
    note(Failed("sft", message="it never came to its first word"))

    def is_healed_meanwhile() -> dict[str, QueuedJob]:
        note(Retried("sft", job_id="5"))
        return {}

    monkeypatch.setattr(commands, "queue", is_healed_meanwhile)
    assert has_log_to_come(run, StageWatch(run))
    monkeypatch.setattr(commands, "queue", dict)
    assert not has_log_to_come(run, StageWatch(run))


def test_the_log_of_a_failed_stage_is_that_of_the_failed_rank(run: RunDir) -> None:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "logs", str(run.path), "sft"]
    write(run, "sft", "7_0_log.err", "RuntimeError: Connection closed by peer\n")
    write(run, "sft", "7_0_log.out", "zero\n")
    write(run, "sft", "7_3_log.err", "Traceback …\nValueError: row 12\n  has no prompt\n")
    ledger = Ledger(run.ledger)
    ledger.append(Started("sft", attempt="7-0", job_id="7"))
    ledger.append(Failed("sft", attempt="7-0", message="RuntimeError: Connection closed by peer", host="n1"))
    ledger.append(Failed("sft", attempt="7-0", message="ValueError: row 12\n  has no prompt", host="n2"))
    shown = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert (shown["rank"], [Path(file).name for file in shown["files"]]) == (3, ["7_3_log.err"])
    assert shown["trouble"]["message"] == "ValueError: row 12\n  has no prompt"
    facts = {"job_id": "7", "reason": "failed", "message": "ValueError: row 12 has no prompt", "node": "n2", "step": 40}
    ledger.append(Ended("sft", **facts, progress=False, seen=None))
    ledger.append(Stopped("sft", message="failed twice"))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "has no prompt" in done.stdout
    assert "zero" not in done.stdout
    assert done.stderr.endswith("==> cause <==\nfailed: ValueError: row 12 has no prompt (rank 3, n2, after step 40)\n")
    ledger.append(RetryRequested("sft"))
    ledger.append(Started("sft", attempt="7-1", job_id="7"))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "zero" in done.stdout
    assert "==> cause" not in done.stderr


def test_an_attempts_log_is_separated_from_other_attempts_and_jobs(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(run.ledger)
    ledger.append(Started("sft", attempt="100-0", job_id="100", restart=0))
    ledger.append(Started("sft", attempt="100-1", job_id="100", restart=1))
    ledger.append(Started("sft", attempt="local-77-1700000000", job_id=None, restart=0))
    write(
        run, "sft", "100_batch.log", "hpc-rlhf: attempt 0 of job 100 on n1\nhpc-rlhf: attempt 1 of job 100 on n2\nb\n"
    )
    write(run, "sft", "100_0_log.out", "first\n\nhpc-rlhf: attempt 1 of job 100 on n2\nsecond\n")
    write(run, "sft", "77_0_log.out", "here\n")
    for number, text in ((1, "first"), (2, "b\nsecond"), (3, "here")):
        assert main(["logs", str(run.path), "sft", "--attempt", str(number)]) == 0
        assert capsys.readouterr().out.strip() == text
    for words, message in (
        (["--attempt", "4"], "stage sft had 3 attempts so far, not 4"),
        (["--attempt", "1", "--rank", "9"], "attempt 1 at sft has no log of rank 9"),
        (["--attempt", "1", "-f"], "cannot be used with --follow"),
    ):
        assert main(["logs", str(run.path), "sft", *words]) != 0
        assert message in capsys.readouterr().err
