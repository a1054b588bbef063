"""hpc-rlhf relocate: adopt a run directory that was moved or copied."""

from __future__ import annotations

import click

from hpc_rlhf.cli.arguments import example, run_argument
from hpc_rlhf.launch.relocate import relocate
from hpc_rlhf.observe.find import find_runs
from hpc_rlhf.observe.printable import printable


@click.command(epilog=example("hpc-rlhf relocate $SCRATCH/runs/demo"))
@run_argument
def command(run: str) -> None:
    """Adopt RUN, a run directory, where it is now.

    A run's spec, scripts and jobs name its folder, so submit, run, eval, heal and cancel refuse a run that was moved
    or copied until this has been called. Finished stages stay finished, and unfinished ones resume from their
    checkpoints. A copy becomes a run of its own. For a sweep's folder, all its runs are adopted.
    """
    for each in find_runs(run):
        origin = relocate(each)
        if origin is None:
            click.echo(f"{each.path} was made here: nothing to do", err=True)
            continue
        click.echo(printable(f"adopted {each.path}, which was made in {origin}"), err=True)
        click.echo(f"to continue it, set run_dir to this folder in your job file, or use {each.job_yaml}", err=True)
