"""Print tables and sentences: the same in a pipe and on a terminal, where sentences are folded at words."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

import click


def echo_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header, bold where the terminal shows it."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(line if plain or row is not header else click.style(line, bold=True))


def echo_words(text: str, err: bool = True) -> None:
    """Print a sentence, on a terminal in lines of its width."""
    if (sys.stderr if err else sys.stdout).isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
    click.echo(text, err=err)
