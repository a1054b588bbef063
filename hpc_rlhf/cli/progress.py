"""Verbs that show the progress of runs: status, watch, list."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.arguments import example, find_run, find_runs, json_option
from hpc_rlhf.cli.console import print_json, print_parts
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe import listing
from hpc_rlhf.observe.format import ago, duration
from hpc_rlhf.observe.goodput.spans import total
from hpc_rlhf.observe.status import read_status
from hpc_rlhf.run import run_index

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_LONGEST_NAME = 30
_WIDE = 100  # terminal columns that have room for every column of the table


@click.command(epilog=example("hpc-rlhf status my-job.yaml"))
@click.argument("run")
@json_option
def status_command(run: str, as_json: bool) -> None:
    """Show the progress of the stages of RUN, a run directory or job file.

    The time left is estimated from the pace of the latest steps, without time in the queue. Below the table
    are what each stage waits for, what interrupted it, and where the time went. ETTR, the effective training
    time ratio, is productive time / time in the allocation, over all attempts of all stages. A sweep's runs
    are shown one per line, as by `list`.

    --json prints the list `stages` and the run's total `goodput`. Each stage has `stage`, `state`, `why`,
    `job_id`, `attempts`, `step`, `total_steps`, `left` (seconds of work left), `numbers` (latest loss, reward
    and so on; the first of them also as `metric` and `value`) and `updated` (when the latest step was done).
    Unknown values are null. Its `goodput` has the seconds waiting (for another stage or the user), queued,
    starting, productive (kept work), lost (work done again) and saving (training paused); `wall`, their sum;
    `ettr`; and `interruptions`, each with reason, time, node, step, and the seconds lost and spent
    restarting. The run's goodput sums over stages, which may run in parallel. For a sweep, --json prints what
    `list --json` does.
    """
    runs = find_runs(run)
    if len(runs) > 1:
        order = [str(run.path) for run in runs]
        _show_runs(sorted(listing.list_runs(runs), key=lambda line: order.index(line.path)), as_json)
        return
    stages = read_status(runs[0])
    if as_json:
        facts = {
            "run_dir": str(runs[0].path),
            "stages": [{**asdict(stage), "goodput": stage.goodput.to_dict()} for stage in stages],
            "goodput": total({stage.stage: stage.goodput for stage in stages}).to_dict(),
        }
        print_json(facts)
        return
    from hpc_rlhf.observe.terminal.board import Board

    print_parts(lambda width, live, ascii_only: Board(width, live, ascii_only).whole(stages))


@click.command(epilog=example("hpc-rlhf watch my-job.yaml"))
@click.argument("run")
def watch_command(run: str) -> None:
    """Show the progress of RUN, a run directory or job file, live on the terminal. Press q or Ctrl-C to quit.

    The display has the stages and their curves from the first step to the latest. It refreshes every two
    seconds and queries Slurm four times a minute.
    """
    run_dir = find_run(run)
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        raise HpcRlhfError("watch needs a terminal", hint=f"to print the status once: hpc-rlhf status {run}")
    from rich.console import Console

    from hpc_rlhf.observe.terminal.watch import watch

    watch(run_dir, Console(highlight=False, markup=False, emoji=False))


@click.command(epilog=example("hpc-rlhf list", "hpc-rlhf list $SCRATCH/runs"))
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path(path_type=Path))
@json_option
def list_command(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the runs that you started, or those in each DIR, the most recently active first.

    DIR is searched two folders deep. Your own runs are recorded in ~/.local/state/hpc-rlhf/runs
    (XDG_STATE_HOME), one path per line; those whose directory is gone are left out.

    The state shown is that of the most important stage: one that failed, else one that runs, else one that
    waits. --json prints a list of runs, each with name, path, state, stage, why, done (the number of finished
    stages) and stages (their total); step, total_steps and left (seconds of work left) of that stage; and
    updated, the time of the last activity. Unknown values are null.
    """
    for folder in folders:
        if not folder.is_dir():
            raise HpcRlhfError("is not a folder", where=str(folder), hint="give folders that hold run directories")
    lines = listing.list_runs(listing.find_runs(folders or run_index.known()))
    if not lines and not as_json:
        where = "here" if folders else "yet; to list those in a folder: hpc-rlhf list DIR"
        click.echo(f"no runs {where}", err=True)
        return
    _show_runs(lines, as_json)


def _show_runs(lines: Sequence[listing.RunLine], as_json: bool) -> None:
    if as_json:
        print_json([asdict(line) for line in lines])
        return
    print_parts(lambda width, live, ascii_only: [_table(lines, width, live)])


def _table(lines: Sequence[listing.RunLine], width: int, live: bool) -> RenderableType:
    """A row for each run."""
    from hpc_rlhf.observe.terminal.tables import grid, styled

    names = ["run", "state", "step", "last"]
    if width >= _WIDE:
        names[2:3] = ["stages", "step", "left"]
    table = grid(*names, "where")
    for column in table.columns[:-1]:
        column.no_wrap = True
    if live:
        table.columns[0].max_width, table.columns[0].overflow = _LONGEST_NAME, "ellipsis"
    now = time.time()
    for line in lines:
        state = styled(line.state)
        if line.stage is not None:
            state.append(f" {line.stage}", style="default")
        cells: dict[str, Text | str] = {
            "run": line.name,
            "state": state,
            "stages": f"{line.done}/{line.stages}",
            "step": "-" if line.step is None else f"{line.step}/{line.total_steps}",
            "left": "-" if line.left is None else duration(line.left),
            "last": "-" if line.updated is None else ago(now - line.updated),
        }
        table.add_row(*(cells[name] for name in names), _short(line.path))
    return table


def _short(path: str) -> str:
    """The shortest way to write a path here."""
    home = os.path.expanduser("~")
    tilde = f"~{path[len(home) :]}" if path.startswith(f"{home}/") else path
    return min(path, tilde, os.path.relpath(path), key=len)
