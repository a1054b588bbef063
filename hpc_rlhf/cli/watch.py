"""hpc-rlhf watch: show a run's progress live."""

from __future__ import annotations

import os
import sys

import click

from hpc_rlhf.cli.arguments import example, run_argument
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.find import find_run


@click.command(epilog=example("hpc-rlhf watch my-job.yaml"))
@run_argument
def command(run: str) -> None:
    """Show the progress of RUN, a run directory or job file, live on the terminal. Press q or Ctrl-C to quit.

    The display has the stages and their curves from the first step to the latest. It refreshes every two
    seconds and queries Slurm four times a minute.
    """
    run_dir = find_run(run)
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        raise HpcRlhfError("watch needs a terminal", hint=f"to print the status once: hpc-rlhf status {run}")
    from hpc_rlhf.observe.terminal.tables import SafeConsole
    from hpc_rlhf.observe.terminal.watch import watch

    watch(run_dir, SafeConsole())
