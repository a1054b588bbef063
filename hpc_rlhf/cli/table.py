"""Print a table: aligned columns on a terminal and in a pipe alike, never cut."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click


def echo_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header, bold where the terminal shows it."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(line if plain or row is not header else click.style(line, bold=True))
