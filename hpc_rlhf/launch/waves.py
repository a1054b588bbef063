"""Run a search on Slurm, in waves of trials. A sentinel, a small job that waits for a wave, starts the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.launch.chain import Outcome, require_slurm
from hpc_rlhf.launch.jobs import cancel, find_jobs, with_dependents
from hpc_rlhf.launch.lock import SILENCE
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.prepare import keep_templates
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.launch.search import Measure, Trials, continuing, is_done
from hpc_rlhf.launch.submit import submit
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Failed, Stopped, Submitted
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir, SweepDir
from hpc_rlhf.run.trials import Trial
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import QueuedJob
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep

_WAVE = 4  # trials of tpe at a time, unless there is a limit
_PATIENCE = SILENCE + 60  # a sentinel can wait


def submit_search(
    sweep: Sweep, beside: Path | None, measure: Measure, by_sentinel: bool = False
) -> dict[str, list[Outcome]]:
    """Submit the trials of a search that are to run now: the rest of a wave that has begun, or the next one.

    Args:
        beside: as ``prepare`` takes it.
        by_sentinel: leave trials that have failed to the user, who instead lets them continue.

    Returns:
        The outcomes by run.

    Raises:
        HpcRlhfError: there is no Slurm here, a trial cannot be submitted, or too many of them have failed.
    """
    require_slurm()
    outcomes: dict[str, list[Outcome]] = {}
    with continuing(sweep, measure, "hpc-rlhf submit", _PATIENCE if by_sentinel else 0.0) as trials:
        if not by_sentinel:
            trials.reopen()
            _write_spec(sweep, trials.folder, beside)
        while True:
            for trial in trials.record_results():
                cancel(trials.run(trial))  # the stages that wait for the one that stopped
            if trials.is_over:
                return outcomes
            if not trials.open:
                trials.add(wave_size(sweep))
            lent = trials.lay_out()
            for trial in trials.open:
                outcomes |= _submit(trials, trial, beside, lent[trial.name], by_sentinel)
            if _guard(sweep, trials):
                return outcomes
            by_sentinel = True  # all jobs of the wave have ended meanwhile, and nobody has looked at their failures


def wave_size(sweep: Sweep) -> int:
    """How many trials to start together."""
    assert sweep.search is not None
    spec = sweep.search.spec
    return min(spec.trials, sweep.limit or (_WAVE if spec.method == "tpe" else spec.trials))


def pass_over(run: RunDir, blocked: Collection[str]) -> None:
    """Let the sentinel of a run's search no longer wait for jobs of the run that cannot start.

    Args:
        blocked: jobs of stages that need another one, which was given up.
    """
    waiting = [job for job in _sentinels(run.sweep) if job.state == "PENDING"]
    if not waiting or not blocked:
        return
    jobs = find_jobs(run)
    dead = with_dependents(set(blocked), [*jobs.live.values(), *jobs.sentinels])
    for job in waiting:
        commands.set_dependency(job.job_id, (), sorted(job.needs - dead))


def cancel_sentinel(folder: SweepDir) -> None:
    """Cancel the sentinel of a search, so that no further wave starts."""
    commands.cancel([job.job_id for job in _sentinels(folder)])


def _submit(
    trials: Trials, trial: Trial, beside: Path | None, lent: Mapping[str, RunDir], by_sentinel: bool
) -> dict[str, list[Outcome]]:
    """Submit a trial unless its jobs are at work or have failed. Returns its outcomes, nothing if it has ended."""
    run, spec = trials.run(trial), trials.members[trial.number].spec
    if by_sentinel and (working := find_jobs(run).working):
        return {trial.name: [Outcome(spec.stage_names[-1], "live", job_id) for job_id in working]}
    failure = _failure(run, spec) if by_sentinel else None
    done = submit(spec, beside, lent) if failure is None else []
    if failure is None and (find_jobs(run).working or is_done(run, spec)):
        return {trial.name: done}
    waits = next((each.detail for each in done if each.did == "waits"), "it ended without a result")
    trials.fail(trial, failure or f"waits {waits}")
    return {}


def _failure(run: RunDir, spec: JobSpec) -> str | None:
    """Why a run whose jobs have all ended is not done; None if it is done, or its next stage was never submitted."""
    missing = next((stage for stage in spec.stage_names if not manifest.is_done(run.stage(stage))), None)
    if missing is None:
        return None
    history = StageHistory.read(run.lender(missing) or run, missing)
    if history.last(Submitted) is None:
        return None
    stopped = history.last(Stopped) or history.last(Failed)
    return f"{missing}: {stopped.message if stopped else 'it ended without a result'}"


def _guard(sweep: Sweep, trials: Trials) -> bool:
    """Let a sentinel wait for the wave. Returns whether jobs of the wave are at work.

    Raises:
        HpcRlhfError: sbatch refused it.
    """
    waits = [job_id for trial in trials.open for job_id in find_jobs(trials.run(trial)).working]
    heal = sweep.members[0].spec.stage(sweep.members[0].spec.stage_names[-1]).slurm.heal
    if not waits or not heal.enabled:
        return bool(waits)
    pending = [job for job in _sentinels(trials.folder) if job.state == "PENDING"]
    if pending:
        commands.set_dependency(pending[0].job_id, (), waits)
        return True
    try:
        commands.submit(trials.folder.sentinel, [f"--dependency={commands.dependency((), waits)}"])
    except HpcRlhfError as error:
        raise HpcRlhfError(
            f"the wave was submitted, but not the sentinel that starts the next one: {error.message}",
            where=str(trials.folder.path),
            hint="submit the search again; if a limit on submitted jobs is reached, first set a smaller sweep_limit",
            exit_code=RUN_FAILED,
        ) from error
    return True


def _sentinels(folder: SweepDir) -> list[QueuedJob]:
    """The pending and running sentinels of a search."""
    script = str(folder.sentinel)
    return [job for job in commands.queue().values() if job.live and job.script.split(" ")[0] == script]


def _write_spec(sweep: Sweep, folder: SweepDir, beside: Path | None) -> None:
    """Write what the sentinel needs: the spec of the search, the templates, and its own script."""
    assert sweep.search is not None
    limit = "" if sweep.limit is None else f"sweep_limit: {sweep.limit}\n"
    write_atomically(folder.spec, sweep.search.dump() + limit)
    if beside is not None:
        keep_templates(folder.path, beside)
    name, plan = str(sweep.search.base.fields["name"].value), make_plan(sweep.members[0].spec)
    write_atomically(folder.sentinel, Templates(folder.path).search_sentinel(name, plan, folder))
