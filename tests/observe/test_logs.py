"""Finding, reading and following the newest log of a stage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.ledger import Ledger
from hpc_rlhf.observe.logs import LogReader, latest_stage
from hpc_rlhf.rundir import RunDir


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


def test_newest_jobs_log_of_the_asked_rank_is_read(run: RunDir) -> None:
    write(run, "sft", "99_0_log.out", "old\n", age=100)
    write(run, "sft", "100_batch.log", "batch\n", age=50)
    write(run, "sft", "100_0_log.out", "zero\n", age=50)
    write(run, "sft", "100_1_log.out", "one\n", age=20)
    write(run, "sft", "100_0_log.err", "", age=50)
    read = [(path.name if path else None, text) for path, text in LogReader(run, "sft").read()]
    assert read == [("100_batch.log", "batch\n"), ("100_0_log.out", "zero\n")]
    assert [text for _, text in LogReader(run, "sft", rank=1).read()] == ["batch\n", "one\n"]


def test_stage_that_wrote_last_is_the_one_meant(run: RunDir) -> None:
    with pytest.raises(HpcRlhfError, match="no stage has a log yet"):
        latest_stage(run)
    write(run, "ppo", "2_0_log.out", "x", age=10)
    write(run, "sft", "1_0_log.err", "x", age=5)
    assert latest_stage(run) == "sft"


def test_missing_stage_and_missing_log_are_told_apart(run: RunDir) -> None:
    with pytest.raises(HpcRlhfError, match="the run has no stage reward"):
        LogReader(run, "reward")
    with pytest.raises(HpcRlhfError, match=r"the run has no stage \.\./stages/ppo"):
        LogReader(run, "../stages/ppo")
    with pytest.raises(HpcRlhfError, match="stage ppo has no log of rank 0 yet"):
        list(LogReader(run, "ppo").read())


def test_follow_goes_on_across_a_requeue_and_a_new_job_until_the_stage_ends(run: RunDir) -> None:
    write(run, "sft", "5_0_log.out", "step 1\n")
    command = [sys.executable, "-u", "-m", "hpc_rlhf.cli", "logs", "-f", str(run.path), "sft"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "step 1\n"
        Ledger(run.ledger).append("requeued", "sft")
        write(run, "sft", "5_0_log.out", "step 2\n")  # requeued: the same file goes on
        assert follower.stdout.readline() == "step 2\n"
        write(run, "sft", "6_0_log.out", "step 3 ü\n", age=-1)
        assert follower.stdout.readline() == "step 3 ü\n"
        write(run, "sft", "6_0_log.out", "last words\n", age=-2)
        Ledger(run.ledger).append("finished", "sft")
        assert follower.stdout.read() == "last words\n"
        assert follower.wait(10) == 0


def test_follow_waits_for_the_first_log_while_one_is_to_come(run: RunDir) -> None:
    command = [sys.executable, "-u", "-m", "hpc_rlhf.cli", "logs", "-f", str(run.path)]
    assert subprocess.run(command, capture_output=True).returncode == 1  # nothing was submitted
    Ledger(run.ledger).append("submitted", "sft", token="t", job_id="5")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert follower.stderr.readline() == "no stage has a log yet; waiting for the first\n"
        write(run, "sft", "5_0_log.out", "step 1\n")
        assert follower.stdout.readline() == "step 1\n"
        Ledger(run.ledger).append("finished", "sft")
        assert follower.wait(10) == 0
    (run.stage("sft").logs / "5_0_log.out").unlink()
    Ledger(run.ledger).append("cancelled", "sft", job_id="5")
    assert subprocess.run(command, capture_output=True).returncode == 1  # it ended without a log
