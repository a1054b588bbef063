"""hpc-rlhf cancel: cancel a run's jobs."""

from __future__ import annotations

import click

from hpc_rlhf.cli.arguments import example, run_argument
from hpc_rlhf.cli.console import print_rows
from hpc_rlhf.launch.jobs import cancel
from hpc_rlhf.launch.waves import cancel_sentinel
from hpc_rlhf.observe.find import find_runs, find_search
from hpc_rlhf.slurm import commands


@click.command(epilog=example("hpc-rlhf cancel my-job.yaml"))
@run_argument
def command(run: str) -> None:
    """Cancel all queued and running jobs of RUN, a run directory or job file, also those that serve its models.

    For a sweep, the jobs of all its runs are cancelled. Checkpoints are kept: submit the same file again to
    resume.
    """
    runs, search = find_runs(run), find_search(run)
    if search is not None and commands.available():
        cancel_sentinel(search)
    # Later runs of a sweep may depend on earlier ones: cancel the dependents first.
    cancelled = {each.path.name: cancel(each) for each in reversed(runs)}
    rows = [(name, stage, job.job_id, job.state) for name, jobs in cancelled.items() for stage, job in jobs]
    if rows:
        print_rows(("stage", "job", "was"), rows, named=len(runs) > 1)
    else:
        click.echo("no job of this run is queued or running on Slurm", err=True)
