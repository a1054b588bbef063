"""Which part of a job's logs belongs to an attempt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_rlhf.run.attempt_logs import AttemptLogs
from hpc_rlhf.run.layout import RunDir, StageDir

BATCH = "7_batch.log"
RANK = "7_0_log.err"


def stage(folder: Path, **logs: str) -> StageDir:
    """A stage with logs that are as old as possible, by this machine's clock."""
    files = RunDir(folder).stage("sft")
    files.logs.mkdir(parents=True)
    for name, text in logs.items():
        (files.logs / name).write_text(text)
        os.utime(files.logs / name, (0, 0))
    return files


def marked(*texts: str, first: int = 0) -> str:
    return "".join(f"hpc-rlhf: attempt {number} of job 7 on n1\n{text}\n" for number, text in enumerate(texts, first))


@pytest.mark.parametrize(
    ("restart", "batch", "rank"),
    [(0, "one", "first"), (1, "two", "second"), (2, "three", ""), (3, "", ""), (None, "three", "")],
)
def test_marks_separate_attempts_whatever_the_clocks_say(
    restart: int | None, batch: str, rank: str, tmp_path: Path
) -> None:
    """The third attempt's rank logged nothing, and the fourth attempt's script never ran."""
    logs = {BATCH: marked("one", "two", "three"), RANK: "first\n\n" + marked("second", "", first=1)}
    attempt = AttemptLogs(stage(tmp_path, **logs), "7", restart)
    assert (attempt.batch.strip(), attempt.last_line(0)) == (batch, rank)


def test_a_mark_is_found_after_an_incomplete_line(tmp_path: Path) -> None:
    files = stage(tmp_path, **{BATCH: marked("one").rstrip() + marked("two", first=1)})
    assert [AttemptLogs(files, "7", restart).batch.strip() for restart in (0, 1)] == ["one", "two"]


def test_a_log_that_began_with_an_attempt_belongs_to_it(tmp_path: Path) -> None:
    """The ranks of earlier attempts never started."""
    files = stage(tmp_path, **{BATCH: marked("one", "two", "three"), RANK: "mine\n" + marked("later", first=2)})
    assert AttemptLogs(files, "7", 1).last_line(0) == "mine"
    assert AttemptLogs(files, "7", 2).last_line(0) == "later"
    assert AttemptLogs(files, "7", 3).last_line(0) == ""


def test_text_before_the_script_counts_and_a_missing_log_is_empty(tmp_path: Path) -> None:
    files = stage(tmp_path, **{BATCH: "slurmstepd: error: execve(): no such file\n"})
    assert "execve" in AttemptLogs(files, "7", 0).batch
    assert AttemptLogs(files, "8", 0).batch == AttemptLogs(files, "8").last_line(0) == ""


def test_the_last_line_is_the_last_with_words_whatever_their_colour(tmp_path: Path) -> None:
    """As Apptainer ends, which colours its messages also where nobody sees it."""
    rank = "\x1b[33mWARNING: weak\n\x1b[0m\x1b[91mERROR  : \x1b[1mno mount namespace\n\x1b[0m\n\x1b[0m"
    attempt = AttemptLogs(stage(tmp_path, **{BATCH: "srun: error\n", RANK: rank}), "7", 0)
    assert attempt.last_line(0) == "ERROR  : no mount namespace"
