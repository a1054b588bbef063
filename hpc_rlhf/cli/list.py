"""hpc-rlhf list: show many runs, each in a line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.options import example, json_option
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.format import ago, duration
from hpc_rlhf.observe.listing import RunLine, find_runs, list_runs
from hpc_rlhf.run import run_index

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_WIDE = 100  # columns from which on there is room for all


@click.command("list", epilog=example("hpc-rlhf list", "hpc-rlhf list $SCRATCH/runs"))
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path(path_type=Path))
@json_option
def command(folders: tuple[Path, ...], as_json: bool) -> None:
    """Show the runs that you submitted or ran, or those in each DIR, the latest first.

    A run in DIR is found up to two folders deep. Your own are noted in ~/.local/state/hpc-rlhf/runs (XDG_STATE_HOME), a
    path a line, as they are submitted; one whose directory is gone is left out.

    A run is what the stage is that tells most: what failed before what runs, and that before what waits. --json has a
    list of runs, each with name, path, state, that stage, why, how many stages are done and there are, and the stage's
    step, total_steps, seconds left at its pace, and when anything last happened (updated). What is not known is null.
    """
    for folder in folders:
        if not folder.is_dir():
            raise HpcRlhfError(
                "is no folder", where=str(folder), hint="give folders that hold run directories"
            )
    lines = list_runs(find_runs(folders or run_index.known()))
    if not lines and not as_json:
        where = "here" if folders else "yet; those of a folder: hpc-rlhf list DIR"
        click.echo(f"no runs {where}", err=True)
        return
    show_runs(lines, as_json)


def show_runs(lines: Sequence[RunLine], as_json: bool) -> None:
    """Print runs, each in a line."""
    if as_json:
        click.echo(json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False))
        return
    from hpc_rlhf.cli.console import print_parts

    print_parts(lambda width, live, plain: [_table(lines, width)])


def _table(lines: Sequence[RunLine], width: int) -> RenderableType:
    from hpc_rlhf.observe.terminal.board import grid, styled

    table = grid()
    names = ["run", "state", "step", "last"]
    if width >= _WIDE:
        names[2:3] = ["stages", "step", "left"]
    for name in names:
        table.add_column(name, no_wrap=True, max_width=30 if name == "run" else None)
    table.add_column("where", overflow="fold", no_wrap=width >= 1000)
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
    """As one would type it here."""
    home = os.path.expanduser("~")
    tilde = f"~{path[len(home) :]}" if path.startswith(f"{home}/") else path
    return min(path, tilde, os.path.relpath(path), key=len)
