"""hpc-rlhf cancel: cancel a run's jobs."""

from __future__ import annotations

import click

from hpc_rlhf.cli.options import example
from hpc_rlhf.cli.run_argument import find_run
from hpc_rlhf.cli.table import echo_table
from hpc_rlhf.launch.cancel import cancel


@click.command(epilog=example("hpc-rlhf cancel my-job.yaml"))
@click.argument("run")
def command(run: str) -> None:
    """Cancel all queued and running jobs of RUN, a run directory or job file.

    What has been saved stays; submitting the same file again goes on from there.
    """
    cancelled = cancel(find_run(run))
    if cancelled:
        echo_table(
            ("stage", "job", "was"), [(stage, job.job_id, job.state) for stage, job in cancelled.items()]
        )
    else:
        click.echo("no job of this run is queued or running on Slurm", err=True)
