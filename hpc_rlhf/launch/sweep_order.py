"""Dependencies between the runs of a sweep: shared stages, and the limit on how many run at the same time.

With a limit of N, a run's first jobs wait until the jobs of the N-th run before it have ended, successfully
or not, and its sentinels too, which may still continue it.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpc_rlhf import trust
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.jobs import find_jobs
from hpc_rlhf.run.layout import RunDir


def borrowed_jobs(run: RunDir, stages: Sequence[str]) -> dict[str, str]:
    """The live jobs of the stages that other runs train for this one."""
    lenders = {stage: lender for stage in stages if (lender := run.lender(stage)) is not None}
    live = {lender: find_jobs(lender).live for lender in set(lenders.values())}
    return {stage: live[lender][stage].job_id for stage, lender in lenders.items() if stage in live[lender]}


def jobs_before(run: RunDir) -> tuple[str, ...]:
    """The jobs that must end before a run may start, except those that can never start themselves."""
    labels, limit = _order(run)
    place = labels.index(run.path.name) if run.path.name in labels else 0
    if limit is None or place < limit:
        return ()
    return tuple(find_jobs(run.sweep.run(labels[place - limit])).working)


def followers(run: RunDir) -> list[RunDir]:
    """The runs that wait for jobs of this one."""
    labels, limit = _order(run)
    if run.path.name not in labels:
        return []
    place = labels.index(run.path.name)
    result = []
    for number, other in enumerate(map(run.sweep.run, labels)):
        borrows = any(path.is_symlink() and path.resolve().parent.parent == run.path.resolve() for path in other.stages)
        if other.job_yaml.exists() and (borrows or (limit is not None and number == place + limit)):
            result.append(other)
    return result


def _order(run: RunDir) -> tuple[list[str], int | None]:
    """The names of the runs in a run's sweep, and their limit; nothing if another user wrote that file."""
    try:
        trust.check_one(run.sweep.json, "")
    except HpcRlhfError:
        return [], None
    return run.sweep.recorded()
