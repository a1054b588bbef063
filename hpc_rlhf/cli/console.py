"""Print what is drawn with rich: to a terminal's width there, and whole lines without colour elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import StringIO
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

_ANY_WIDTH = 10_000


def print_parts(draw: Callable[[int, bool, bool], Iterable[RenderableType]]) -> None:
    """Print to stdout what ``draw(width, live, plain)`` makes; plain where only ASCII can be shown."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    plain = not console.encoding.startswith("utf")
    if console.is_terminal:
        for part in draw(console.width, True, plain):
            console.print(part)
        return
    # A pipe has no width: nothing is folded, cut or filled up.
    text = StringIO()
    into = Console(file=text, width=_ANY_WIDTH, highlight=False, markup=False, emoji=False, color_system=None)
    for part in draw(_ANY_WIDTH, False, plain):
        into.print(part)
    for line in text.getvalue().splitlines():
        click.echo(line.rstrip())
