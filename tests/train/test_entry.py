"""How an attempt ends under Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Failed, Requeued, Resumed, RetryRequested, Saved, Started
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.train.entry import Attempt, run_stage
from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag
from hpc_rlhf.train.runtime.world import World
from tests.ledger_events import event
from tests.train.stages import make_run, tiny_spec

TIME_LIMIT, PREEMPTED = 1, 2


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The job ids that were requeued; the test runs as rank 0 of job 9."""
    jobs: list[str] = []
    for name, value in {"SLURM_JOB_ID": "9", "SUBMITIT_EXECUTOR": "slurm", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(commands, "was_preempted", lambda job: False)
    monkeypatch.setattr(commands, "why_ended", lambda job, restarts: "")
    monkeypatch.setattr(commands, "requeue", jobs.append)
    return jobs


def finished(run: RunDir) -> None:
    run.stage("sft").model.mkdir(parents=True, exist_ok=True)
    manifest.write(run.stage("sft").model, {"step": 6, "seconds": 1.0, "metrics": {}})


def finish(run: RunDir, code: int, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt whose stage succeeds, and that received a signal after its last safe point."""
    monkeypatch.setattr("hpc_rlhf.train.runtime.world.join", lambda *_: world)
    monkeypatch.setattr("hpc_rlhf.train.runtime.world.leave", lambda: None)
    stop = StopFlag()

    def train(attempt: Attempt, *_: object) -> None:
        finished(run)
        attempt.stop.received = code

    monkeypatch.setattr(Attempt, "train", train)
    Attempt(run, "sft", stop).run()


@pytest.mark.parametrize("followed", [True, False])
def test_a_stage_that_finishes_while_preempted_does_not_run_again(
    tmp_path: Path, world: World, requeued: list[str], monkeypatch: pytest.MonkeyPatch, followed: bool
) -> None:
    """Its script lets its dependents start, and only the last stage takes the time for a report."""
    run = make_run(tiny_spec(tmp_path / "run", ranks=1, sft={}, **({"dpo": {}} if followed else {})))
    monkeypatch.setattr(commands, "was_preempted", lambda job: True)
    finish(run, PREEMPTED, world, monkeypatch)
    assert requeued == []
    assert [event.name for event in Ledger(run.ledger).events("sft")] == ["started", "finished"]
    assert run.report.exists() != followed


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_attempt_that_finds_its_stage_done_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    run = make_run(tiny_spec(tmp_path / "run", ranks=2))
    finished(run)
    monkeypatch.setattr(StopFlag, "install", lambda flag: None)
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    run.report.mkdir()  # it cannot be written there
    run_stage(str(run.path), "sft")
    run.report.rmdir()
    run_stage(str(run.path), "sft")
    assert run.report.exists() == (rank == "0")


@pytest.mark.parametrize(("by_user", "continues"), [(False, False), (True, True)])
def test_requeues_count_over_all_jobs_since_the_user_last_asked(
    tmp_path: Path, world: World, requeued: list[str], monkeypatch: pytest.MonkeyPatch, by_user: bool, continues: bool
) -> None:
    """Slurm counts the requeues of one job only, and this is the first attempt of the second job."""
    run = make_run(tiny_spec(tmp_path / "run", ranks=1, sft={"slurm": {"max_requeues": 2}}))
    ledger = Ledger(run.ledger)
    for name in ("started", "requeued", "started", "retried"):
        ledger.append(event(name, stage="sft", job_id="8", step=3, reason="preempted"))
    if by_user:
        ledger.append(RetryRequested("sft"))
    monkeypatch.setattr("hpc_rlhf.train.runtime.world.join", lambda *_: world)
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def stop(attempt: Attempt, *_: object) -> None:
        raise StageStopped("preempted", 5)

    monkeypatch.setattr(Attempt, "train", stop)
    expected = SystemExit if continues else HpcRlhfError
    with pytest.raises(expected, match=None if continues else "all that slurm.max_requeues allows"):
        Attempt(run, "sft", StopFlag()).run()
    assert requeued == (["9"] if continues else [])


def test_a_stop_that_another_ranks_failure_caused_is_not_requeued_as_a_preemption(
    tmp_path: Path, world: World, requeued: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Slurm 26.05 on, srun sends the other ranks the signal of a preemption if one fails."""
    run = make_run(tiny_spec(tmp_path / "run", ranks=1))
    monkeypatch.setattr("hpc_rlhf.train.runtime.world.join", lambda *_: world)
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def stop(attempt: Attempt, *_: object) -> None:
        Ledger(run.ledger).append(Failed("sft", attempt=attempt.name, message="ValueError: bad row"))
        raise StageStopped("preempted", 5)

    monkeypatch.setattr(Attempt, "train", stop)
    with pytest.raises(SystemExit) as error:
        Attempt(run, "sft", StopFlag()).run()
    assert (error.value.code, requeued) == (1, [])
    assert Ledger(run.ledger).last(Requeued, "sft") is None


@pytest.mark.parametrize("code", [0, TIME_LIMIT, PREEMPTED])  # the last without a preemption in Slurm
def test_a_stage_that_finishes_in_time_is_not_requeued(
    tmp_path: Path, world: World, requeued: list[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    run = make_run(tiny_spec(tmp_path / "run", ranks=1))
    finish(run, code, world, monkeypatch)
    assert requeued == []
    assert [event.name for event in Ledger(run.ledger).events("sft")] == ["started", "finished"]


@pytest.mark.parametrize(
    ("before", "stops"),
    [
        ([("requeued", 3, "time limit")], True),
        ([("requeued", 3, "time limit"), ("started", 0, ""), ("requeued", 3, "preempted")], True),
        ([("ended", 3, "time limit")], True),  # killed at the limit, and resubmitted by heal
        ([("requeued", 3, "preempted")], False),
        ([("requeued", 3, "time limit"), ("started", 0, ""), ("saved", 4, "")], False),
        ([("requeued", 3, "time limit"), ("anew", 0, "")], False),  # the user asked for another attempt
    ],
)
def test_a_step_that_never_fits_the_time_limit_is_not_retried_forever(
    tmp_path: Path,
    world: World,
    requeued: list[str],
    monkeypatch: pytest.MonkeyPatch,
    before: list[tuple[str, int, str]],
    stops: bool,
) -> None:
    run = make_run(tiny_spec(tmp_path / "run", ranks=1, sft={"slurm": {"max_requeues": 9}}))
    ledger = Ledger(run.ledger)
    ledger.append(Saved("sft", step=3))
    ledger.append(Requeued("sft", step=3, reason="preempted"))
    ledger.append(Started("sft"))
    ledger.append(Resumed("sft", step=3, part=0))
    for name, step, reason in before:
        ledger.append(event(name, stage="sft", step=step, reason=reason))
    monkeypatch.setattr("hpc_rlhf.train.runtime.world.join", lambda *_: world)
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def stop(attempt: Attempt, *_: object) -> None:
        raise StageStopped("time limit", 3)

    monkeypatch.setattr(Attempt, "train", stop)
    with pytest.raises(HpcRlhfError if stops else SystemExit, match="hit the time limit" if stops else None):
        Attempt(run, "sft", StopFlag()).run()
    assert requeued == ([] if stops else ["9"])
