"""hpc-rlhf cancel: cancel a run's jobs."""

from __future__ import annotations

import click

from hpc_rlhf.cli.options import example
from hpc_rlhf.cli.run_argument import find_runs
from hpc_rlhf.cli.table import echo_table
from hpc_rlhf.launch.cancel import cancel


@click.command(epilog=example("hpc-rlhf cancel my-job.yaml"))
@click.argument("run")
def command(run: str) -> None:
    """Cancel all queued and running jobs of RUN, a run directory or job file, of all runs where it is a sweep's.

    What has been saved stays; submitting the same file again goes on from there.
    """
    runs = find_runs(run)
    # Those that wait for others first.
    cancelled = {each.path.name: cancel(each) for each in reversed(runs)}
    rows = [
        (*((name,) if len(runs) > 1 else ()), stage, job.job_id, job.state)
        for name, jobs in cancelled.items()
        for stage, job in jobs.items()
    ]
    if rows:
        echo_table((*(("run",) if len(runs) > 1 else ()), "stage", "job", "was"), rows)
    else:
        click.echo("no job of this run is queued or running on Slurm", err=True)
