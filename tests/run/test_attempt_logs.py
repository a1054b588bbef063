"""Which words of a job's logs are an attempt's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_rlhf.run.attempt_logs import AttemptLogs
from hpc_rlhf.run.layout import RunDir, StageDir

BATCH = "7_batch.log"
RANK = "7_0_log.err"


def stage(folder: Path, **logs: str) -> StageDir:
    """A stage with logs that are as old as a file can be, by this machine's clock."""
    files = RunDir(folder).stage("sft")
    files.logs.mkdir(parents=True)
    for name, text in logs.items():
        (files.logs / name).write_text(text)
        os.utime(files.logs / name, (0, 0))
    return files


def marked(*said: str, first: int = 0) -> str:
    return "".join(
        f"hpc-rlhf: attempt {number} of job 7 on n1\n{text}\n" for number, text in enumerate(said, first)
    )


@pytest.mark.parametrize(
    ("restart", "batch", "rank"),
    [(0, "one", "first"), (1, "two", "second"), (2, "three", ""), (3, "", ""), (None, "three", "")],
)
def test_marks_tell_attempts_apart_whatever_the_clocks_say(
    restart: int | None, batch: str, rank: str, tmp_path: Path
) -> None:
    """The rank of the third had no words, and the fourth never came to its script."""
    logs = {BATCH: marked("one", "two", "three"), RANK: "first\n\n" + marked("second", "", first=1)}
    attempt = AttemptLogs(stage(tmp_path, **logs), "7", restart)
    assert (attempt.batch.strip(), attempt.last_line(0)) == (batch, rank)


def test_a_mark_is_seen_behind_a_line_that_was_cut_off(tmp_path: Path) -> None:
    files = stage(tmp_path, **{BATCH: marked("one").rstrip() + marked("two", first=1)})
    assert [AttemptLogs(files, "7", restart).batch.strip() for restart in (0, 1)] == ["one", "two"]


def test_a_log_that_began_with_an_attempt_is_its_own(tmp_path: Path) -> None:
    """Ranks of the attempts before never came up."""
    files = stage(
        tmp_path, **{BATCH: marked("one", "two", "three"), RANK: "mine\n" + marked("later", first=2)}
    )
    assert AttemptLogs(files, "7", 1).last_line(0) == "mine"
    assert AttemptLogs(files, "7", 2).last_line(0) == "later"
    assert AttemptLogs(files, "7", 3).last_line(0) == ""


def test_what_is_said_before_the_script_begins_counts_and_no_log_says_nothing(tmp_path: Path) -> None:
    files = stage(tmp_path, **{BATCH: "slurmstepd: error: execve(): no such file\n"})
    assert "execve" in AttemptLogs(files, "7", 0).batch
    assert AttemptLogs(files, "8", 0).batch == AttemptLogs(files, "8").last_line(0) == ""
