"""Repairs a chain: judges how its stages ended, retries those worth retrying, and restores dependencies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.chain import Chain, Outcome, require_slurm
from hpc_rlhf.launch.jobs import RunJobs, find_jobs
from hpc_rlhf.launch.lock import SILENCE, hold
from hpc_rlhf.launch.plan import PlannedJob, make_plan
from hpc_rlhf.launch.sweep_order import followers
from hpc_rlhf.launch.waves import pass_over
from hpc_rlhf.run import acting, failures, manifest, notify
from hpc_rlhf.run.attempt_logs import AttemptLogs, last_seen, last_step
from hpc_rlhf.run.events import Ended, Retried, RetryRequested, Stopped
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.reasons import CANCELLED_BY_HAND, CANCELLED_BY_TOOL, LAUNCH_FAILURE
from hpc_rlhf.run.retry_policy import Retry, Stop, StopKind, decide
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.holds import find_hold
from hpc_rlhf.slurm.jobs import JobRecord, QueuedJob, is_full
from hpc_rlhf.spec.load import read_spec

# A sentinel can afford to wait, even for the lock of a machine that is gone.
_PATIENCE = SILENCE + 60
_COMPLETING = 30.0  # seconds for the end of a job, including its epilog


def heal(run: RunDir, by_sentinel: bool = False) -> list[Outcome]:
    """Make every stage of a run continue, in the order of the plan.

    A stage with a complete model is done, whatever Slurm reports, and stages that wait for it are released. A
    queued or running one keeps its job, and gets a sentinel and the right dependencies. One that ended
    without its model is retried, under its own job id if Slurm still has it.

    Args:
        run: a run that was submitted.
        by_sentinel: stop where another attempt would not help. The user instead makes a new start: earlier
            failures no longer count.

    Raises:
        HpcRlhfError: there is no Slurm here, the run was never submitted, this user may not act on it, or another
            process works on it.
    """
    acting.check(run)
    require_slurm()
    outcomes = _repair(run, by_sentinel)
    if any(each.did in ("submitted", "requeued", "stopped") for each in outcomes):
        _pass_over(run, outcomes)
        for follower in followers(run):
            with suppress(HpcRlhfError):  # its own sentinels, or the user, will repair it
                _pass_over(follower, _repair(follower, by_sentinel=True))
    return outcomes


def _pass_over(run: RunDir, outcomes: Sequence[Outcome]) -> None:
    """Let the search that a run belongs to go on without the stages that wait for the user."""
    with suppress(HpcRlhfError):  # the user can submit the search again
        pass_over(run, [each.job_id for each in outcomes if each.did == "waits" and each.job_id])


def _repair(run: RunDir, by_sentinel: bool) -> list[Outcome]:
    acting.check(run)
    plan = make_plan(read_spec(run.job_yaml))
    with hold(run.submit_lock, "hpc-rlhf heal", _PATIENCE if by_sentinel else 0.0):
        jobs = _settled(run)
        if not jobs.latest:
            raise HpcRlhfError(
                "this run was not submitted, or was moved since, so there is no chain to repair",
                where=str(run.path),
                hint="submit it with hpc-rlhf submit FILE, or continue without Slurm: hpc-rlhf run FILE",
            )
        chain = Chain(plan, jobs, "heal")
        outcomes = [_StageHealer(chain, job, by_sentinel).heal() for job in plan.jobs]
        guarded = [_guarded(chain, job, outcome) for job, outcome in zip(plan.jobs, outcomes, strict=True)]
        chain.submit_rest_later()
        return guarded


def _settled(run: RunDir) -> RunJobs:
    """The run's jobs, once none of them is completing."""
    deadline = time.monotonic() + _COMPLETING
    while True:
        jobs = find_jobs(run)
        if time.monotonic() > deadline or all(job.state != "COMPLETING" for job in jobs.live.values()):
            return jobs
        time.sleep(0.5)


def _guarded(chain: Chain, job: PlannedJob, outcome: Outcome) -> Outcome:
    """The outcome, after making sure of the stage's sentinel. The stage can succeed without one."""
    try:
        chain.guard(job)
    except HpcRlhfError as error:
        return replace(outcome, detail="; ".join(filter(None, (outcome.detail, error.message))))
    return outcome


class _StageHealer:
    """Heals one stage."""

    def __init__(self, chain: Chain, job: PlannedJob, by_sentinel: bool) -> None:
        self._chain, self._job, self._by_sentinel = chain, job, by_sentinel
        self._stage = job.stage

    def heal(self) -> Outcome:
        chain, stage = self._chain, self._stage
        if (settled := chain.settled(self._job)) is not None:
            return settled
        live = chain.jobs.live.get(stage)
        blocked = [
            need for need in self._job.needs if not manifest.is_done(chain.run.stage(need)) and need not in chain.ids
        ]
        if blocked:
            return Outcome(stage, "waits", live.job_id if live else None, f"for {' and '.join(blocked)} to be repaired")
        if live:
            return self._attach(live)
        job_id = chain.jobs.latest.get(stage)
        if job_id is None:
            return self._chain.send_or_wait(self._job)
        return self._restart(job_id, commands.find_record(job_id))

    def _attach(self, queued: QueuedJob) -> Outcome:
        hold = find_hold(queued)
        if hold is None or not hold.by_slurm:
            return self._chain.attach(self._job)
        past = commands.find_record(queued.job_id)
        node = past.failed_node if past else ""
        self._chain.ledger.append(
            Ended(self._stage, job_id=queued.job_id, reason=LAUNCH_FAILURE, message=queued.reason, node=node)
        )
        verdict = self._verdict()
        if isinstance(verdict, Stop):
            return self._stop(verdict, queued.job_id)
        commands.delay_start(queued.job_id, verdict.delay, self._excluded(verdict))
        commands.release(queued.job_id)
        return self._record_retry(Outcome(self._stage, "requeued", queued.job_id, f"{hold.meaning}; released"), verdict)

    def _restart(self, job_id: str, past: JobRecord | None) -> Outcome:
        """Retry a job that ended without its stage's model, or stop."""
        ended = self._ended(job_id, past)
        cancelled = ended.reason in (CANCELLED_BY_TOOL, CANCELLED_BY_HAND)
        orphaned = past is not None and past.dependency_failed and ended.reason == CANCELLED_BY_HAND
        waits = bool(self._chain.after(self._job))
        if orphaned or (waits and not cancelled):
            # It ended because its input was missing, and the stage that produces that is being repaired.
            return self._retry(job_id, past, Retry(), "its input is being produced again")
        verdict = self._verdict()
        if isinstance(verdict, Stop):
            return self._stop(verdict, job_id)
        return self._retry(job_id, past, verdict, _describe(ended))

    def _ended(self, job_id: str, past: JobRecord | None) -> Ended:
        """How the latest attempt ended: as the ledger has it, or judged and written now."""
        history = self._history()
        before = history.attempt.last(Ended)
        if before is not None:
            return before
        files = self._chain.run.stage(self._stage)
        logs = AttemptLogs(files, job_id, past.restarts if past else None)
        judged = failures.judge(history, past, logs, last_step(files))
        ended = replace(judged, stage=self._stage, job_id=job_id, seen=last_seen(files))
        orphaned = past is not None and past.dependency_failed and ended.reason == CANCELLED_BY_HAND
        if not orphaned:
            self._chain.ledger.append(ended)
        return ended

    def _verdict(self) -> Retry | Stop:
        if not self._by_sentinel:
            self._chain.ledger.append(RetryRequested(self._stage))
            return Retry()
        window = self._history().since_user
        if window.last(Ended) is None:
            return Retry()  # the user asked for another attempt, and healing was interrupted there
        settings = self._job.slurm
        verdict = decide(window, settings.max_requeues, settings.heal.backoff_seconds)
        return replace(verdict, without=self._expendable(verdict.without)) if isinstance(verdict, Retry) else verdict

    def _expendable(self, nodes: tuple[str, ...]) -> tuple[str, ...]:
        """As many of these nodes, the first ones, as can be excluded with enough left for the job."""
        for count in range(len(nodes), 0, -1):
            with suppress(HpcRlhfError):
                script = self._chain.run.sbatch(self._stage)
                commands.try_out(script, [f"--exclude={self._excluding(nodes[:count])}"])
                return nodes[:count]
        return ()

    def _stop(self, verdict: Stop, job_id: str) -> Outcome:
        if not self._history().is_stopped and verdict.kind is not StopKind.EARLY:
            self._chain.ledger.append(Stopped(self._stage, message=verdict.message))
            if self._by_sentinel:
                notify.send_stop(self._chain.run, self._stage, verdict.kind, verdict.message)
        return Outcome(self._stage, "stopped", job_id, verdict.message)

    def _retry(self, job_id: str, past: JobRecord | None, verdict: Retry, why: str) -> Outcome:
        outcome = self._requeue(job_id, past, verdict)
        if outcome is None:
            try:
                outcome = self._chain.send(self._job, verdict.delay, verdict.without)
            except HpcRlhfError as error:
                if is_full(error.message):
                    raise  # a sentinel tries again
                if verdict.without:
                    return self._retry(job_id, None, replace(verdict, without=()), why)
                return self._stop(Stop(StopKind.REFUSED, error.message), job_id)
        return self._record_retry(replace(outcome, detail=why), verdict)

    def _requeue(self, job_id: str, past: JobRecord | None, verdict: Retry) -> Outcome | None:
        """Requeue the job under its own id, so that its dependents stay valid; None if that is impossible."""
        if past is None or not past.requeueable or past.state == "CANCELLED" or past.reason == "BadConstraints":
            return None
        try:
            return self._chain.requeue(self._job, job_id, verdict.delay, self._excluded(verdict))
        except HpcRlhfError:
            queued = commands.queue().get(job_id)
            if queued is None or not queued.live:
                return None
            return Outcome(self._stage, "requeued", job_id)

    def _excluded(self, verdict: Retry) -> str | None:
        """The nodes to exclude, of the spec and the verdict, as a host list; None if they are as before."""
        before = self._history().last(Retried)
        if verdict.without == (before.without if before else ()):
            return None
        return self._excluding(verdict.without)

    def _excluding(self, nodes: Sequence[str]) -> str:
        """A host list of some nodes and of those that the spec excludes."""
        return ",".join(filter(None, (self._job.slurm.exclude, *nodes)))

    def _record_retry(self, outcome: Outcome, verdict: Retry) -> Outcome:
        self._chain.ledger.append(
            Retried(self._stage, job_id=outcome.job_id, delay=verdict.delay, without=verdict.without)
        )
        details = [outcome.detail]
        if verdict.delay:
            details.append(f"not before {verdict.delay} s from now")
        if verdict.without:
            details.append(f"not on {', '.join(verdict.without)}")
        return replace(outcome, detail="; ".join(filter(None, details)))

    def _history(self) -> StageHistory:
        return StageHistory.read(self._chain.run, self._stage)


def _describe(ended: Ended) -> str:
    return f"{ended.reason}: {ended.message}" if ended.message else ended.reason
