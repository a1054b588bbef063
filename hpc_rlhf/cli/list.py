"""hpc-rlhf list: list runs, one per line."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.arguments import example, json_option
from hpc_rlhf.cli.console import print_json, print_parts
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe import listing
from hpc_rlhf.run import run_index
from hpc_rlhf.run.format import ago, duration

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_LONGEST_NAME = 30
_WIDE = 100  # terminal columns that have room for every column of the table


@click.command(epilog=example("hpc-rlhf list", "hpc-rlhf list $SCRATCH/runs"))
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path(path_type=Path))
@json_option
def command(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the runs that you started, or those in each DIR, the most recently active first.

    DIR is searched two folders deep; what you may not read is left out and counted. Your own runs are
    recorded in ~/.local/state/hpc-rlhf/runs (XDG_STATE_HOME), one path per line; those whose directory is
    gone are left out. Other commands accept the name of such a run instead of its directory.

    The state shown is that of the most important stage: one that failed, else one that runs, else one that
    waits. --json prints a list of runs, each with name, path, state, stage, why, done (the number of finished
    stages) and stages (their total); step, total_steps and left (seconds of work left) of that stage; and
    updated, the time of the last activity. Unknown values are null.
    """
    for folder in folders:
        if not folder.is_dir():
            raise HpcRlhfError("is not a folder", where=str(folder), hint="give folders that hold run directories")
    runs = listing.find_runs(folders or run_index.known())
    lines = listing.list_runs(runs)
    if left_out := len(runs) - len(lines):
        what = "a folder that" if left_out == 1 else f"{left_out} folders that"
        click.echo(f"left out {what} cannot be read, or whose plan is damaged", err=True)
    if not lines and not as_json:
        where = "here" if folders else "yet; to list those in a folder: hpc-rlhf list DIR"
        click.echo(f"no runs {where}", err=True)
        return
    show_runs(lines, as_json)


def show_runs(lines: Sequence[listing.RunLine], as_json: bool) -> None:
    """Print runs, one per line."""
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
