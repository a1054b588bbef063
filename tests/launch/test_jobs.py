"""Finding a job whose submitter died before it learned the job's id."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import jobs
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.run import sentinel
from hpc_rlhf.run.events import Serving, Submitted, Submitting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import QueuedJob


class Waiting:
    """A clock that advances only during sleep; a job appears in the queue after a while."""

    def __init__(self, arrives: float, job: QueuedJob) -> None:
        self.now, self._arrives, self._job = 0.0, arrives, job

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def queue(self) -> dict[str, QueuedJob]:
        return {self._job.job_id: self._job} if self.now >= self._arrives else {}


MARKED = QueuedJob("7", "t.sft", "PENDING", "Priority", "hpc-rlhf:mine")


def find(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrives: float,
    *announced: tuple[str, float],
    job: QueuedJob = MARKED,
) -> tuple[jobs.RunJobs, float]:
    """The jobs of a run whose sft was announced with tokens, each at a time by its submitter's clock, and how
    long it took to find them."""
    run = RunDir(folder)
    lines = [{"time": time, "event": "submitting", "stage": "sft", "token": token} for token, time in announced]
    run.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    waiting = Waiting(arrives, job)
    monkeypatch.setattr(jobs, "time", waiting)
    monkeypatch.setattr(commands, "queue", waiting.queue)
    return jobs.find_jobs(run), waiting.now


FUTURE, PAST = 4e9, 1.0


@pytest.mark.parametrize("time", [FUTURE, PAST])
def test_a_job_in_flight_is_waited_for_whatever_its_submitters_clock(
    time: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_found, _ = find(tmp_path, monkeypatch, 5, ("mine", time))
    assert jobs_found.latest == {"sft": "7"}
    assert jobs_found.tokens == {"7": "mine"}


@pytest.mark.parametrize("time", [FUTURE, PAST])
def test_a_job_that_never_arrives_is_not_waited_for_long(
    time: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_found, waited = find(tmp_path, monkeypatch, 1e6, ("mine", time))
    assert (jobs_found.latest, waited) == ({}, 10)


def test_only_the_latest_job_of_a_stage_is_waited_for_but_an_earlier_one_in_the_queue_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever announced the later one had waited for the earlier one."""
    jobs_found, waited = find(tmp_path, monkeypatch, 0, ("lost", FUTURE), ("mine", PAST))
    assert (jobs_found.latest, waited) == ({"sft": "7"}, 0)
    jobs_found, waited = find(tmp_path, monkeypatch, 0, ("mine", PAST), ("lost", FUTURE))
    assert (jobs_found.latest, waited) == ({"sft": "7"}, 10)


@pytest.mark.parametrize(
    ("name", "script", "known", "found"),
    [
        ("t.sft", "{run}/stages/sft/logs/.submission_file_1.sh", "", True),
        ("t.reward", "{run}/stages/reward/logs/.submission_file_1.sh", "", False),
        ("t.sft.sentinel", "{run}/scripts/sft.sentinel.sbatch", "", False),
        ("t.sft", "{run}-2/stages/sft/logs/.submission_file_1.sh", "", False),
        ("t.sft", "{run}/stages/sft/logs/.submission_file_1.sh", "7", False),
    ],
)
def test_a_job_whose_comment_a_plugin_replaced_is_found_by_its_name_and_script(
    name: str, script: str, known: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = QueuedJob("7", name, "PENDING", "Priority", "cost-centre=1", script=script.format(run=tmp_path))
    queue = {"7": job}
    assert (jobs.find_submission(queue, RunDir(tmp_path), "sft", "mine", {known}) is not None) is found
    assert jobs.find_submission(queue, RunDir(tmp_path), "sft", "mine", None) is None
    if found:
        jobs_found, waited = find(tmp_path, monkeypatch, 5, ("lost", PAST), ("mine", PAST), job=job)
        assert (jobs_found.latest, jobs_found.tokens, waited) == ({"sft": "7"}, {"7": "mine"}, 5)


@pytest.mark.parametrize(
    ("after", "waits"), [("afternotok:7(unfulfilled)", True), ("afternotok:6(unfulfilled)", False)]
)
def test_a_sentinel_whose_comment_a_plugin_replaced_is_found_by_its_script(
    after: str, waits: bool, tmp_path: Path
) -> None:
    script = f"{tmp_path}/scripts/sft.sentinel.sbatch"
    guard = QueuedJob("8", "t.sft.sentinel", "PENDING", "Dependency", "cost-centre=1", after, script)
    other = QueuedJob("9", "t.sft.sentinel", "PENDING", "Dependency", "cost-centre=1", after, f"/other{script}")
    queue, run = {"8": guard, "9": other}, RunDir(tmp_path)
    assert sentinel.waiting(queue, run, "mine", "7") == [guard] * waits
    assert jobs.RunJobs(run, queue=queue).sentinels == [guard]


@pytest.mark.parametrize(
    ("why", "whose", "instead"),
    [
        ("moved", "its", "first cancel them: scancel 9 7 3"),
        ("copied", "the original's", "to cancel them: hpc-rlhf cancel {made}"),
        ("another user's", "anna's", "ask anna for: hpc-rlhf cancel {run}"),
        ("busy", "its", "then cancel them again"),
    ],
)
def test_a_refused_cancel_names_the_jobs(
    why: str, whose: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / ("run" if why in ("another user's", "busy") else "made")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.plan_json.write_text(json.dumps({"run_dir": str(made)}))
    ledger = Ledger(run.ledger)
    for event in (
        Submitting("sft", token="mine"),
        Submitting("ppo", token="b"),
        Submitted("ppo", token="b", job_id="6"),
    ):
        ledger.append(event)
    ledger.append(Serving("sft", job_id="3"))
    if why == "copied":
        made.mkdir()
        (made / "ledger.jsonl").write_bytes(run.ledger.read_bytes())
    done = QueuedJob("6", "t.ppo", "COMPLETED", "", "hpc-rlhf:b")
    guard = QueuedJob("9", "t.sft.sentinel", "PENDING", "", "c", script=f"{made}/scripts/sft.sentinel.sbatch")
    serves, other = QueuedJob("3", "t.serve", "RUNNING", "", ""), QueuedJob("4", "t.sft", "RUNNING", "", "hpc-rlhf:c")
    queue = {job.job_id: job for job in (MARKED, done, guard, serves, other)}
    asked: list[str | None] = []
    monkeypatch.setattr(commands, "available", lambda: True)
    monkeypatch.setattr(commands, "queue", lambda user=None: asked.append(user) or queue)
    monkeypatch.setattr(commands, "cancel", lambda ids: pytest.fail("cancelled"))
    monkeypatch.setattr(jobs, "_PATIENCE", 0)
    if why == "another user's":
        monkeypatch.setattr("hpc_rlhf.run.acting.other_owner", lambda run: "anna")
    before = run.ledger.read_text()

    busy = hold(run.submit_lock, "a test") if why == "busy" else nullcontext()
    with busy, pytest.raises(HpcRlhfError) as refused:
        jobs.cancel(run)

    listed = "sentinel 9 (PENDING), sft 7 (PENDING), serve 3 (RUNNING)"
    assert refused.value.message.endswith(f"\n{whose} queued and running jobs were not cancelled: {listed}")
    assert str(refused.value.hint).endswith(f"; {instead.format(made=made, run=run.path)}")
    assert asked == ["anna" if why == "another user's" else None]
    assert run.ledger.read_text() == before


def test_cancel_ends_the_jobs_that_serve_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    events = [("serving", "sft", "1"), ("relocated", "sft", ""), *(("serving", "sft", str(job)) for job in range(2, 6))]
    lines = [{"time": 1.0, "event": name, "stage": stage, "job_id": job} for name, stage, job in events]
    run.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {"1": "t.serve", "2": "t.serve", "3": "t.serve", "4": "another", "6": "t.serve"}
    states = {"3": "CANCELLED"}
    queue = {job: QueuedJob(job, name, states.get(job, "RUNNING"), "", "") for job, name in names.items()}
    cancelled: list[str] = []
    monkeypatch.setattr(commands, "queue", lambda: queue)
    monkeypatch.setattr(commands, "cancel", cancelled.extend)
    monkeypatch.setattr("hpc_rlhf.run.acting.check", lambda run: None)
    assert jobs.cancel(run) == [("serve", queue["2"])]
    assert cancelled == ["2"]
