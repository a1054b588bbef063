"""Finds a run's jobs from the ledger and Slurm together, and cancels them.

Every call of sbatch is announced in the ledger with a token, which the job has in its comment. So a job whose
id was never recorded, because the submitting process died, is still found and adopted. Where a submit plugin overwrites
comments, it is found by its name and its script.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.launch.plan import PlannedJob
from hpc_rlhf.run import acting, sentinel
from hpc_rlhf.run.events import Cancelled, Refused, Relocated, Serving, Submitted, Submitting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import QueuedJob

# Seconds after which an orphaned sbatch has certainly given up waiting for the controller.
_IN_FLIGHT = 10.0
_PATIENCE = 30.0  # a running sentinel finishes soon


@dataclass(frozen=True)
class RunJobs:
    """A run's jobs.

    Attributes:
        run: the run.
        live: the queued and running ones, by stage.
        latest: the id of each stage's latest job, live or not.
        tokens: the token by which each job was announced, by job id.
        queue: all jobs that squeue showed.
    """

    run: RunDir
    live: dict[str, QueuedJob] = field(default_factory=dict)
    latest: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    queue: dict[str, QueuedJob] = field(default_factory=dict)

    @property
    def sentinels(self) -> list[QueuedJob]:
        """The pending and running sentinels."""
        return sentinel.living(self.queue, self.run, self.tokens.values())

    @property
    def working(self) -> list[str]:
        """The ids of the jobs that are running or can still start, those of sentinels among them."""
        living = [*self.live.values(), *self.sentinels]
        dead = with_dependents({job.job_id for job in living if job.reason == "DependencyNeverSatisfied"}, living)
        return [job.job_id for job in living if job.job_id not in dead]


def with_dependents(jobs: set[str], living: Sequence[QueuedJob]) -> set[str]:
    """Some jobs, and those that wait for one of them."""
    while more := {job.job_id for job in living if job.needs & jobs} - jobs:
        jobs = jobs | more
    return jobs


def submission_options(
    job: PlannedJob, token: str, after: tuple[str, ...], delay: int = 0, without: Sequence[str] = (),
    behind: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """sbatch options of one submission. They are not in the script, which is the same every time.

    Args:
        token: identifies this submission in the job's comment.
        after: ids of jobs that must succeed first.
        delay: seconds before it may start.
        without: nodes to exclude, besides those that the spec excludes.
        behind: ids of jobs that must end first, successfully or not.
    """
    comment = " ".join(filter(None, (_mark(token), job.slurm.comment)))
    options = [f"--comment={comment}"]
    if dependency := commands.dependency(after, behind):
        options.append(f"--dependency={dependency}")
    if delay:
        options.append(f"--begin=now+{delay}")
    if without:
        options.append(f"--exclude={','.join(filter(None, (job.slurm.exclude, *without)))}")
    return options


def find_jobs(run: RunDir) -> RunJobs:
    """The run's jobs. Adopts those whose id was never recorded."""
    ledger = Ledger(run.ledger)
    submitted, unanswered = _submissions(ledger)
    if not submitted and not unanswered:
        return RunJobs(run)
    queue = commands.queue()
    # Counted from now, because the time of the announcement is by another machine's clock.
    deadline = time.monotonic() + _IN_FLIGHT
    for token, (stage, latest_of_stage) in unanswered.items():
        known = submitted if latest_of_stage else None
        while (job := find_submission(queue, run, stage, token, known)) is None:
            if not latest_of_stage or time.monotonic() >= deadline:
                break
            time.sleep(1)
            queue = commands.queue()
        if job is not None:
            adopt(run, stage, token, job.job_id)
            submitted[job.job_id] = (stage, token)
    latest = {stage: job_id for job_id, (stage, _) in submitted.items()}
    queued = ((stage, queue[job_id]) for job_id, (stage, _) in submitted.items() if job_id in queue)
    live = {stage: job for stage, job in queued if job.live and job.is_of(stage)}
    return RunJobs(run, live, latest, {job_id: token for job_id, (_, token) in submitted.items()}, queue)


def cancel(run: RunDir) -> list[tuple[str, QueuedJob]]:
    """Cancel a run's queued and running jobs, and return those that train or serve, each with its stage or ``serve``.

    Raises:
        HpcRlhfError: this user may not act on the run, or another process works on it; the message names its jobs.
    """
    with ExitStack() as stack:
        try:
            acting.check(run)
            stack.enter_context(hold(run.submit_lock, "hpc-rlhf cancel", _PATIENCE))
        except HpcRlhfError as error:
            raise _naming_jobs(error, run) from None
        jobs = find_jobs(run)
        # The sentinels first, or they would start when their stages are cancelled.
        commands.cancel([job.job_id for job in jobs.sentinels])
        serving = _serving_jobs(run)
        commands.cancel([job.job_id for job in (*jobs.live.values(), *serving)])
        for stage, job in jobs.live.items():
            Ledger(run.ledger).append(Cancelled(stage, job_id=job.job_id))
    return [*jobs.live.items(), *(("serve", job) for job in serving)]


def living_jobs(run: RunDir, user: str | None = None) -> list[tuple[str, QueuedJob]]:
    """A run's queued and running jobs, each with its stage, ``sentinel`` or ``serve``; sentinels come first.

    The run may be another user's, or have been moved. Nothing is written to its ledger.
    """
    place = RunDir(acting.made_elsewhere(run) or run.path)
    submitted, unanswered = _submissions(Ledger(run.ledger))
    queue = commands.queue(user)
    jobs = [(stage, queue.get(job_id)) for job_id, (stage, _) in submitted.items()]
    for token, (stage, latest_of_stage) in unanswered.items():
        jobs.append((stage, find_submission(queue, place, stage, token, submitted if latest_of_stage else None)))
    tokens = [*unanswered, *(token for _, token in submitted.values())]
    sentinels = [("sentinel", job) for job in sentinel.living(queue, place, tokens)]
    stages = [(stage, job) for stage, job in jobs if job is not None and job.live and job.is_of(stage)]
    return [*sentinels, *stages, *(("serve", job) for job in _serving_jobs(run, queue))]


def _naming_jobs(error: HpcRlhfError, run: RunDir) -> HpcRlhfError:
    """Why a run's jobs are not cancelled, with the jobs, and what can be done about them."""
    owner, origin = acting.other_owner(run), acting.made_elsewhere(run)
    try:
        jobs = living_jobs(run, owner) if commands.available() else []
    except HpcRlhfError:  # Slurm does not answer
        return error
    if not jobs:
        return error
    names = ", ".join(f"{stage} {job.job_id} ({job.state})" for stage, job in jobs)
    if owner is not None:
        whose, instead = f"{owner}'s", f"ask {owner} for: hpc-rlhf cancel {shlex.quote(str(run.path))}"
    elif origin is not None and acting.is_copy(run, origin):
        whose, instead = "the original's", f"to cancel them: hpc-rlhf cancel {shlex.quote(str(origin))}"
    elif origin is not None:
        whose, instead = "its", f"first cancel them: scancel {shlex.join(job.job_id for _, job in jobs)}"
    else:
        whose, instead = "its", "then cancel them again"
    message = f"{error.message}\n{whose} queued and running jobs were not cancelled: {names}"
    return HpcRlhfError(message, error.where, f"{error.hint}; {instead}", error.exit_code)


def _serving_jobs(run: RunDir, queue: Mapping[str, QueuedJob] | None = None) -> list[QueuedJob]:
    """The queued and running jobs that serve the run's models. Without a queue, asks Slurm if there were such jobs."""
    submitted: dict[str, str] = {}  # the stage of each
    for event in Ledger(run.ledger).events():
        if isinstance(event, Serving):
            submitted[event.job_id] = event.stage
        elif isinstance(event, Relocated):
            submitted = {job_id: stage for job_id, stage in submitted.items() if stage != event.stage}
    if queue is None:
        queue = commands.queue() if submitted else {}
    return [job for job_id in submitted if (job := queue.get(job_id)) and job.live and job.is_of("serve")]


def adopt(run: RunDir, stage: str, token: str, job_id: str) -> None:
    """Record a job that Slurm accepted although sbatch did not return its id."""
    acting.check(run)  # it may be another one of the sweep
    Ledger(run.ledger).append(Submitted(stage, token=token, job_id=job_id))


def find_submission(
    queue: Mapping[str, QueuedJob], run: RunDir, stage: str, token: str, known: Container[str] | None
) -> QueuedJob | None:
    """The job of one submission: the one with its token, or else the stage's newest that the ledger does not have.

    Args:
        known: the ids of the jobs that the ledger has; None to look for the token only, as for a submission that is
            not the stage's latest.
    """
    marked = next((job for job in queue.values() if job.comment.split(" ")[0] == _mark(token)), None)
    if marked is not None or known is None:
        return marked
    new = [job for job in queue.values() if job.is_of(stage) and job.is_from(run.path) and job.job_id not in known]
    return max(new, key=lambda job: int(job.job_id), default=None)


def _mark(token: str) -> str:
    return f"hpc-rlhf:{token}"


def _submissions(ledger: Ledger) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, bool]]]:
    """The stage and token of every known job id; and for every token that sbatch has not answered, its stage, and
    whether it is the stage's latest: a later announcement implies that the earlier one was resolved."""
    submitted: dict[str, tuple[str, str]] = {}
    unanswered: dict[str, tuple[str, bool]] = {}
    for event in ledger.events():
        if isinstance(event, Submitting):
            for token, (stage, _) in unanswered.items():
                if stage == event.stage:
                    unanswered[token] = (stage, False)
            unanswered[event.token] = (event.stage, True)
        elif isinstance(event, Submitted):
            unanswered.pop(event.token, None)
            submitted[event.job_id] = (event.stage, event.token)
        elif isinstance(event, Refused):
            unanswered.pop(event.token, None)
        elif isinstance(event, Relocated):  # the jobs are those of the folder that it was copied from
            submitted = {job_id: known for job_id, known in submitted.items() if known[0] != event.stage}
            unanswered = {token: known for token, known in unanswered.items() if known[0] != event.stage}
    return submitted, unanswered
