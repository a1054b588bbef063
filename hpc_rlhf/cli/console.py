"""Output with rich: fitted to a terminal, plain and unwrapped in a pipe."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.colours import coloured
from hpc_rlhf.observe.printable import printable, printable_json

if TYPE_CHECKING:
    from rich.console import RenderableType

_UNLIMITED = 10_000


def print_parts(draw: Callable[[int, bool, bool], Iterable[RenderableType]]) -> None:
    """Print the renderables of ``draw(width, live, ascii_only)`` to stdout.

    In a pipe ``width`` is practically unlimited: lines are neither wrapped, cut nor padded, and have no
    colour. On a terminal, text with ``no_wrap`` is left for the terminal to wrap, so that it can be copied.
    """
    from hpc_rlhf.observe.terminal.tables import SafeConsole

    console = SafeConsole()
    ascii_only = not console.encoding.startswith("utf")
    if console.is_terminal:
        for part in draw(console.width, True, ascii_only):
            console.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))
        return
    text = StringIO()
    pipe = SafeConsole(file=text, width=_UNLIMITED, color_system=None)
    for part in draw(_UNLIMITED, False, ascii_only):
        pipe.print(part)
    for line in text.getvalue().splitlines():
        click.echo(line.rstrip())


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print a table to stdout.

    Args:
        header: column names; a column without data worth a name has an empty one.
        right: names of the columns that are right-aligned.
    """
    from hpc_rlhf.observe.terminal.tables import grid

    table = grid(*header, right=right)
    for row in rows:
        table.add_row(*row)
    print_parts(lambda width, live, ascii_only: [table])


def print_rows(header: Sequence[str], rows: Iterable[Sequence[str]], named: bool) -> None:
    """Print rows that start with the name of their run, with or without that name."""
    print_table(("run", *header) if named else header, rows if named else [row[1:] for row in rows])


def print_json(facts: object) -> None:
    """Print JSON that people can read."""
    click.echo(printable_json(json.dumps(facts, indent=1, ensure_ascii=False)))


def print_wrapped(text: str, err: bool = True) -> None:
    """Print a sentence, wrapped to the terminal's width; in a pipe as one line."""
    if (sys.stderr if err else sys.stdout).isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
    click.echo(coloured(printable(text), sys.stderr if err else sys.stdout), err=err)
