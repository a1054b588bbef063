"""What heal does to a chain, on a fake Slurm with records that a real one rarely has."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.heal import heal
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.launch.submit import submit
from hpc_rlhf.run import manifest, notify
from hpc_rlhf.run.events import (
    Cancelled,
    Ended,
    Failed,
    Requeued,
    Retried,
    RetryRequested,
    Saved,
    Started,
    Stopped,
    Submitted,
    Submitting,
)
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import JobRecord, QueuedJob
from hpc_rlhf.spec.load import read_spec
from tests.launch.specs import make_spec

STUCK = "DependencyNeverSatisfied"


@dataclass
class FakeSlurm:
    """Slurm's records, and the commands that change them."""

    jobs: dict[str, QueuedJob] = field(default_factory=dict)
    past: dict[str, JobRecord] = field(default_factory=dict)
    did: list[tuple[Any, ...]] = field(default_factory=list)
    ids: Any = field(default_factory=lambda: itertools.count(100))
    needed: frozenset[str] = frozenset()  # nodes that jobs cannot do without

    def put(self, job_id: str, name: str, state: str, reason: str = "", after: str = "", **known: Any) -> None:
        comment = f"hpc-rlhf:t{job_id}"
        self.jobs[job_id] = QueuedJob(job_id, name, state, reason, comment, after)
        known["reason"] = known.pop("reason_of_end", "")
        self.past[job_id] = JobRecord(job_id, state, known.pop("code", "1:0"), **{"requeueable": True, **known})

    def forget(self, job_id: str) -> None:
        del self.jobs[job_id], self.past[job_id]

    def requeue(self, job_id: str) -> None:
        self.did.append(("requeue", job_id))
        self.jobs[job_id] = replace(self.jobs[job_id], state="PENDING", reason="BeginTime")

    def set_dependency(self, job_id: str, needs: tuple[str, ...], behind: tuple[str, ...] = ()) -> None:
        self.did.append(("depend", job_id, *needs))

    def delay_start(self, job_id: str, seconds: int, excluded: str | None) -> None:
        if seconds or excluded is not None:
            self.did.append(("put off", job_id, seconds, excluded))

    def release(self, job_id: str) -> None:
        self.did.append(("release", job_id))

    def try_out(self, script: Path, options: list[str]) -> str:
        for option in options:
            name, _, nodes = option.partition("=")
            if name == "--exclude" and self.needed & set(nodes.split(",")):
                raise HpcRlhfError("sbatch --test-only: Requested node configuration is not available")
        return "to start"

    def submit(self, script: Path, options: list[str]) -> str:
        """A sentinel."""
        job_id = str(next(self.ids))
        after = options[1].partition("=")[2]
        self.did.append(("sentinel", script.name.partition(".")[0], after))
        comment = options[0].partition("=")[2]
        self.jobs[job_id] = QueuedJob(job_id, "x.sentinel", "PENDING", "Dependency", comment, after)
        return job_id


@dataclass
class FakeExecutor:
    """Submits a stage to the fake Slurm."""

    fake: FakeSlurm
    plan: Plan
    job: PlannedJob
    options: list[str]

    def send(self) -> str:
        job_id = str(next(self.fake.ids))
        self.fake.did.append(("send", self.job.stage, *self.options[1:]))
        comment = self.options[0].partition("=")[2]
        self.fake.jobs[job_id] = QueuedJob(job_id, self.job.job_name, "PENDING", "Priority", comment)
        return job_id


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    slurm = FakeSlurm()
    monkeypatch.setattr(commands, "available", lambda: True)
    monkeypatch.setattr(commands, "queue", lambda: dict(slurm.jobs))
    monkeypatch.setattr(commands, "find_record", slurm.past.get)
    for name in ("requeue", "set_dependency", "delay_start", "release", "submit", "try_out"):
        monkeypatch.setattr(commands, name, getattr(slurm, name))
    monkeypatch.setattr("hpc_rlhf.launch.executor.StageExecutor", partial(FakeExecutor, slurm))
    return slurm


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def make_run(folder: Path, **slurm: Any) -> RunDir:
    """A run whose jobs 1 (SFT), 2 (reward) and 3 (PPO) were submitted; SFT and reward have started."""
    spec = make_spec(folder, {"heal": {"backoff_seconds": 10}, "exclude": "bad1", **slurm})
    with claim(spec, "test") as run:
        prepare(spec, run)
    ledger = Ledger(run.ledger)
    for job_id, stage in (("1", "sft"), ("2", "reward"), ("3", "ppo")):
        ledger.append(Submitting(stage, token=f"t{job_id}"))
        ledger.append(Submitted(stage, token=f"t{job_id}", job_id=job_id))
    for stage in ("sft", "reward"):
        ledger.append(Started(stage, attempt="-"))
    return run


def finish(run: RunDir, *stages: str) -> None:
    for stage in stages:
        model = run.stage(stage).model
        model.mkdir()
        (model / "weights").write_text("w")
        manifest.write(model, {"step": 9})


def add_sentinels(fake: FakeSlurm, *job_ids: str) -> None:
    """Give each of the jobs a pending sentinel."""
    for job_id in job_ids:
        after = f"afternotok:{job_id}(unfulfilled)"
        mark = f"hpc-rlhf-sentinel:t{job_id}"
        fake.jobs[f"9{job_id}"] = QueuedJob(f"9{job_id}", "s", "PENDING", "Dependency", mark, after)


def kinds(outcomes: list[Outcome]) -> list[str]:
    return [outcome.did for outcome in outcomes]


def events(run: RunDir, stage: str) -> list[str]:
    return [event.name for event in Ledger(run.ledger).events(stage)]


def test_a_failed_stage_is_requeued_and_its_dependents_wait_for_it_again(fake: FakeSlurm, run: RunDir) -> None:
    fake.put("1", "demo.sft", "FAILED", code="1:0", nodes="n1")
    fake.put("2", "demo.reward", "RUNNING")
    fake.put("3", "demo.ppo", "PENDING", STUCK, "afterok:1(failed),afterok:2(unfulfilled)")
    add_sentinels(fake, "2", "3")
    outcomes = heal(run, by_sentinel=True)
    assert kinds(outcomes) == ["requeued", "live", "live"]
    assert fake.did == [
        ("requeue", "1"),
        ("put off", "1", 10, None),
        ("depend", "3", "1", "2"),
        ("sentinel", "sft", "afternotok:1"),
    ]
    assert events(run, "sft")[-2:] == ["ended", "retried"]
    again = heal(run, by_sentinel=True)
    assert kinds(again) == ["live", "live", "live"]
    assert [did for did in fake.did[4:] if did[0] != "depend"] == [], "a second one finds nothing to do"


def test_a_finished_stage_that_slurm_calls_preempted_frees_its_dependents(fake: FakeSlurm, run: RunDir) -> None:
    """Slurm 25 always records a stage that requeued itself while it was preempted as PREEMPTED."""
    finish(run, "sft")
    fake.put("1", "demo.sft", "PREEMPTED", code="0:0")
    fake.put("2", "demo.reward", "RUNNING")
    fake.put("3", "demo.ppo", "PENDING", STUCK, "afterok:1(failed),afterok:2(unfulfilled)")
    add_sentinels(fake, "2", "3")
    assert kinds(heal(run, by_sentinel=True)) == ["done", "live", "live"]
    assert fake.did == [("depend", "3", "2")]
    finish(run, "reward")
    fake.put("2", "demo.reward", "PREEMPTED", code="0:0")
    fake.did.clear()
    heal(run, by_sentinel=True)
    assert fake.did == [("depend", "3")]
    assert "ended" not in events(run, "sft"), "it ended well"


def test_a_finished_stage_that_slurm_started_again_is_left_to_end(fake: FakeSlurm, run: RunDir) -> None:
    finish(run, "sft", "reward")
    fake.put("1", "demo.sft", "RUNNING")
    fake.put("3", "demo.ppo", "PENDING", "Dependency", "afterok:1(unfulfilled)")
    add_sentinels(fake, "3")
    assert kinds(heal(run, by_sentinel=True)) == ["done", "done", "live"]
    assert fake.did == []


def test_a_job_that_slurm_forgot_is_submitted_again_without_the_bad_node(fake: FakeSlurm, run: RunDir) -> None:
    """So is the dependent that the site's kill_invalid_depend removed."""
    finish(run, "reward")
    ledger = Ledger(run.ledger)
    for step in (3, 5):
        ledger.append(Saved("sft", step=step))
        ledger.append(Ended("sft", reason="node failure", node="n7", message="", step=step, progress=True))
        ledger.append(Started("sft", attempt="-"))
    fake.past["3"] = JobRecord("3", "CANCELLED", "0:0", dependency_failed=True)
    assert kinds(heal(run, by_sentinel=True)) == ["submitted", "done", "submitted"]
    assert fake.did == [
        ("send", "sft", "--begin=now+10", "--exclude=bad1,n7"),
        ("send", "ppo", "--dependency=afterok:100"),
        ("sentinel", "sft", "afternotok:100"),
        ("sentinel", "ppo", "afternotok:101"),
    ]
    assert "ended" not in events(run, "ppo")


def lose_nodes(run: RunDir, *nodes: str) -> None:
    """Let SFT lose each of some nodes twice, with progress, in attempts of its own."""
    ledger = Ledger(run.ledger)
    for step, node in enumerate([*nodes, *nodes], 1):
        ledger.append(Saved("sft", step=step))
        ledger.append(Ended("sft", reason="node failure", node=node, message="", step=step, progress=True))
        ledger.append(Started("sft", attempt="-"))


@pytest.mark.parametrize(
    ("needed", "excluded"), [((), ("--exclude=bad1,n7,n8",)), (("n8",), ("--exclude=bad1,n7",)), (("n7", "n8"), ())]
)
def test_no_more_nodes_are_excluded_than_the_job_can_do_without(
    fake: FakeSlurm, run: RunDir, needed: tuple[str, ...], excluded: tuple[str, ...]
) -> None:
    finish(run, "reward")
    lose_nodes(run, "n7", "n8")
    fake.needed = frozenset(needed)
    add_sentinels(fake, "3")
    heal(run, by_sentinel=True)
    assert fake.did[0] == ("send", "sft", "--begin=now+10", *excluded)


def test_a_job_that_is_refused_with_exclusions_is_submitted_without(
    fake: FakeSlurm, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where sbatch's test passed, and the nodes that it counted on went away."""

    class Picky(FakeExecutor):
        def send(self) -> str:
            if any(option.startswith("--exclude") for option in self.options):
                raise HpcRlhfError("sbatch rejected the job: Requested node configuration is not available")
            return super().send()

    monkeypatch.setattr("hpc_rlhf.launch.executor.StageExecutor", partial(Picky, fake))
    finish(run, "reward")
    lose_nodes(run, "n7")
    fake.put("3", "demo.ppo", "PENDING", STUCK, "afterok:1(failed)")
    add_sentinels(fake, "3")
    assert kinds(heal(run, by_sentinel=True)) == ["submitted", "done", "live"]
    assert fake.did[0] == ("send", "sft", "--begin=now+10")
    assert Ledger(run.ledger).last(Retried, "sft").without == ()  # type: ignore[union-attr]


def test_a_job_that_found_no_nodes_left_is_submitted_without_exclusions(fake: FakeSlurm, run: RunDir) -> None:
    """Newer Slurm accepts such a job, and ends it with BadConstraints."""
    finish(run, "reward")
    lose_nodes(run, "n7")
    ledger = Ledger(run.ledger)
    ledger.append(Ended("sft", reason="node failure", node="n7", message="", step=2, progress=False))
    ledger.append(Retried("sft", job_id="1", without=("n7",)))
    fake.put("1", "demo.sft", "FAILED", reason_of_end="BadConstraints")
    fake.put("3", "demo.ppo", "PENDING", STUCK, "afterok:1(failed)")
    add_sentinels(fake, "3")
    assert kinds(heal(run, by_sentinel=True)) == ["submitted", "done", "live"]
    assert fake.did[:2] == [("send", "sft", "--begin=now+40"), ("depend", "3", "100")]
    assert ledger.last(Ended, "sft").reason == "no nodes left"  # type: ignore[union-attr]


@pytest.mark.parametrize("reason", ["time limit", "preempted"])
def test_a_stage_whose_requeue_slurm_refuses_goes_on_under_a_new_id(fake: FakeSlurm, run: RunDir, reason: str) -> None:
    """Again and again, on the same node: it does nothing wrong there."""
    finish(run, "reward")
    ledger, job_id = Ledger(run.ledger), "1"
    fake.put("3", "demo.ppo", "PENDING", STUCK, "afterok:1(failed)")
    add_sentinels(fake, "3")
    for part in (4, 8, 12):
        name = f"{job_id}-0"
        ledger.append(Started("sft", attempt=name, job_id=job_id))
        ledger.append(Saved("sft", attempt=name, step=0, part=part))
        ledger.append(Requeued("sft", attempt=name, step=0, reason=reason))
        refused = f"scontrol requeue: Requested operation is presently disabled for job {job_id}"
        ledger.append(Failed("sft", attempt=name, message=refused, exit_code=1))
        fake.put(job_id, "demo.sft", "FAILED", nodes="n1", requeueable=False, restarts=0)
        fake.did.clear()
        outcome = heal(run, by_sentinel=True)[0]
        assert (outcome.did, outcome.detail, fake.did[0]) == ("submitted", reason, ("send", "sft"))
        job_id = str(outcome.job_id)
    assert [event.reason for event in ledger.events("sft") if isinstance(event, Ended)] == [reason] * 3
    assert StageHistory.read(run, "sft").since_user.requeues == 3


def test_a_stopped_stage_stays_stopped_until_the_user_heals(fake: FakeSlurm, run: RunDir) -> None:
    finish(run, "reward")
    Ledger(run.ledger).append(Failed("sft", attempt="-", message="no such file", exit_code=2))
    fake.put("1", "demo.sft", "FAILED", code="2:0")
    fake.put("3", "demo.ppo", "PENDING", STUCK, "afterok:1(failed)")
    add_sentinels(fake, "3")
    for _ in range(2):
        outcomes = heal(run, by_sentinel=True)
        assert kinds(outcomes) == ["stopped", "done", "waits"]
        assert outcomes[0].detail == "user error: no such file"
    assert events(run, "sft").count("stopped") == events(run, "sft").count("ended") == 1
    assert fake.did == []
    assert kinds(heal(run)) == ["requeued", "done", "live"]
    assert events(run, "sft")[-2:] == ["anew", "retried"]


def test_a_sentinel_notifies_the_user_once(fake: FakeSlurm, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """It then exits with 3, so that its job fails and Slurm sends its mail."""
    sent: list[tuple[object, ...]] = []
    monkeypatch.setattr(notify, "send", lambda run, *news: sent.append(news))
    finish(run, "reward")
    ledger = Ledger(run.ledger)
    ledger.append(Failed("sft", attempt="-", message="no such file", exit_code=2))
    fake.put("1", "demo.sft", "FAILED", code="2:0")
    add_sentinels(fake, "3")
    assert [main(["heal", "--sentinel", str(run.path)]) for _ in range(2)] == [3, 0]
    assert sent == [("stopped", "sft", "user error: no such file")]
    assert "user error: no such file; fix the cause" in run.report.read_text()

    ledger.append(RetryRequested("sft"))
    for step in range(101):
        ledger.append(Requeued("sft", step=step, reason="preempted"))
        ledger.append(Started("sft", attempt=f"1-{step}"))
        ledger.append(Saved("sft", attempt=f"1-{step}", step=step))
    ledger.append(Failed("sft", attempt="1-100", message="RuntimeError: no"))
    fake.put("1", "demo.sft", "FAILED")
    assert main(["heal", "--sentinel", str(run.path)]) == 3
    ((news, stage, why),) = sent[1:]
    assert (news, stage) == ("budget spent", "sft")
    assert str(why).startswith("it was requeued 100 times, all that slurm.max_requeues allows")


def test_a_user_error_is_not_reported_as_a_spent_budget(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[object, ...]] = []
    monkeypatch.setattr(notify, "send", lambda run, *news: sent.append(news))
    run = make_run(tmp_path / "run", max_requeues=0)
    Ledger(run.ledger).append(Failed("sft", attempt="-", message="no such file", exit_code=2))
    Ledger(run.ledger).append(Failed("reward", attempt="-", message="RuntimeError: no"))
    fake.put("1", "demo.sft", "FAILED", code="2:0")
    fake.put("2", "demo.reward", "FAILED")
    heal(run, by_sentinel=True)
    assert [(news, stage) for news, stage, _ in sent] == [("stopped", "sft"), ("budget spent", "reward")]


def test_a_heal_that_was_interrupted_still_retries(fake: FakeSlurm, run: RunDir) -> None:
    finish(run, "reward")
    ledger = Ledger(run.ledger)
    ledger.append(Ended("sft", reason="user error", node="", message="", step=0, progress=False))
    ledger.append(Stopped("sft", message="user error"))
    ledger.append(RetryRequested("sft"))
    fake.put("1", "demo.sft", "FAILED")
    fake.put("3", "demo.ppo", "PENDING", STUCK, "afterok:1(failed)")
    add_sentinels(fake, "3")
    assert kinds(heal(run, by_sentinel=True)) == ["requeued", "done", "live"]


@pytest.mark.parametrize("by_tool", [False, True])
def test_a_cancelled_stage_is_only_restarted_by_the_user(fake: FakeSlurm, run: RunDir, by_tool: bool) -> None:
    finish(run, "reward")
    if by_tool:
        Ledger(run.ledger).append(Cancelled("sft", job_id="1"))
    fake.put("1", "demo.sft", "CANCELLED", requeueable=not by_tool)
    fake.put("3", "demo.ppo", "CANCELLED", requeueable=not by_tool)
    assert kinds(heal(run, by_sentinel=True)) == ["stopped", "done", "waits"]
    assert kinds(heal(run)) == ["submitted", "done", "submitted"]


def test_a_dependent_that_the_user_cancelled_stays_cancelled_when_its_need_is_repaired(
    fake: FakeSlurm, run: RunDir
) -> None:
    finish(run, "reward")
    fake.put("1", "demo.sft", "FAILED")
    fake.put("3", "demo.ppo", "CANCELLED")
    assert kinds(heal(run, by_sentinel=True)) == ["requeued", "done", "stopped"]


def test_a_dependent_that_ran_too_early_waits_again(fake: FakeSlurm, run: RunDir) -> None:
    """Its input's job was COMPLETED but left no model."""
    finish(run, "reward")
    ledger = Ledger(run.ledger)
    ledger.append(Started("ppo", attempt="-"))
    ledger.append(Failed("ppo", attempt="-", message="the model of stage sft is not complete", exit_code=1))
    fake.put("1", "demo.sft", "COMPLETED", code="0:0")
    fake.put("3", "demo.ppo", "FAILED")
    assert kinds(heal(run, by_sentinel=True)) == ["requeued", "done", "requeued"]
    assert fake.did[:4] == [("requeue", "1"), ("put off", "1", 10, None), ("requeue", "3"), ("depend", "3", "1")]


HELD_BY_SLURM = [
    ("PENDING", "launch_failed_requeued_held"),
    ("PENDING", "launch failed requeued held"),
    ("REQUEUE_HOLD", "(launch failed requeued held)"),
    ("REQUEUE_HOLD", ""),
    ("PENDING", "launch failure limit exceeded requeued held"),
    ("PENDING", "JobHoldMaxRequeue"),
    ("PENDING", "user_env_retrieval_failed_requeued_held"),
]


@pytest.mark.parametrize(("state", "reason"), HELD_BY_SLURM)
def test_a_job_that_slurm_holds_is_released(fake: FakeSlurm, run: RunDir, state: str, reason: str) -> None:
    finish(run, "reward")
    fake.put("1", "demo.sft", state, reason, failed_node="n4")
    fake.put("3", "demo.ppo", "PENDING", "Dependency", "afterok:1(unfulfilled)")
    add_sentinels(fake, "1", "3")
    assert kinds(heal(run, by_sentinel=True)) == ["requeued", "done", "live"]
    assert fake.did == [("put off", "1", 10, None), ("release", "1")]
    ended = Ledger(run.ledger).last(Ended, "sft")
    assert ended is not None
    assert (ended.reason, ended.node) == ("launch failure", "n4")


@pytest.mark.parametrize(("state", "reason"), HELD_BY_SLURM)
def test_submit_releases_a_job_that_slurm_holds(fake: FakeSlurm, run: RunDir, state: str, reason: str) -> None:
    fake.put("1", "demo.sft", state, reason)
    fake.put("2", "demo.reward", "PENDING", "JobHeldUser")
    fake.put("3", "demo.ppo", "PENDING", "Dependency", "afterok:1(unfulfilled),afterok:2(unfulfilled)")
    add_sentinels(fake, "1", "2", "3")
    outcomes = submit(read_spec(run.job_yaml))
    assert kinds(outcomes) == ["live", "live", "live"]
    assert outcomes[0].detail.endswith("; released")
    assert fake.did == [("release", "1")]


@pytest.mark.parametrize(
    ("state", "reason"),
    [("PENDING", "JobHeldUser"), ("PENDING", "JobHeldAdmin"), ("REQUEUE_HOLD", "job requeued in held state")],
)
def test_a_job_that_somebody_holds_stays_held(fake: FakeSlurm, run: RunDir, state: str, reason: str) -> None:
    finish(run, "reward")
    fake.put("1", "demo.sft", state, reason)
    fake.put("3", "demo.ppo", "PENDING", "Dependency", "afterok:1(unfulfilled)")
    add_sentinels(fake, "1", "3")
    assert kinds(heal(run)) == ["live", "done", "live"]
    assert fake.did == []


def test_a_sentinel_that_is_refused_breaks_nothing(
    fake: FakeSlurm, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(script: Path, options: list[str]) -> str:
        raise HpcRlhfError("sbatch: no")

    monkeypatch.setattr(commands, "submit", refuse)
    fake.put("1", "demo.sft", "FAILED")
    fake.put("2", "demo.reward", "RUNNING")
    fake.put("3", "demo.ppo", "PENDING", STUCK)
    outcomes = heal(run, by_sentinel=True)
    assert kinds(outcomes) == ["requeued", "live", "live"]
    assert "the sentinel was refused: sbatch: no" in outcomes[0].detail


def test_two_at_once_and_a_run_without_a_chain_are_refused(fake: FakeSlurm, run: RunDir, tmp_path: Path) -> None:
    with hold(run.submit_lock, "hpc-rlhf submit"), pytest.raises(HpcRlhfError, match="`hpc-rlhf submit`"):
        heal(run)
    spec = make_spec(tmp_path / "local")
    with claim(spec, "test") as other:
        prepare(spec, other)
    with pytest.raises(HpcRlhfError, match="not submitted, or was moved"):
        heal(other)
