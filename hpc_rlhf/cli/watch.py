"""hpc-rlhf watch: show on a terminal how a run is getting on, as it does."""

from __future__ import annotations

import os
import sys

import click

from hpc_rlhf.cli.options import example
from hpc_rlhf.cli.run_argument import find_run
from hpc_rlhf.errors import HpcRlhfError


@click.command(epilog=example("hpc-rlhf watch my-job.yaml"))
@click.argument("run")
def command(run: str) -> None:
    """Show how RUN, a run directory or job file, is getting on, drawn anew every two seconds; q or Ctrl-C ends it.

    The curves go from each stage's first step to its last. Slurm is asked four times a minute.
    """
    run_dir = find_run(run)
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        raise HpcRlhfError(
            "watch draws on a terminal, and this is none", hint=f"hpc-rlhf status {run} prints it once"
        )
    from rich.console import Console

    from hpc_rlhf.observe.terminal.watch import watch

    watch(run_dir, Console(highlight=False, markup=False, emoji=False))
