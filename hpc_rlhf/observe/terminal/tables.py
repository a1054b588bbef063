"""How every table looks on the terminal, and the colours of states."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hpc_rlhf.observe.printable import printable


class SafeConsole(Console):
    """A console that interprets no markup, and shows control characters instead of sending them to the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


# Colours only underline what the words say.
STYLES = {
    **dict.fromkeys(("done", "ok"), "green"),
    **dict.fromkeys(("running", "starting", "completing", "stopping"), "cyan"),
    **dict.fromkeys(("waiting", "pending", "held", "requeued", "suspended", "not started", "warning"), "yellow"),
    **dict.fromkeys(("failed", "refused", "stuck", "stopped", "cancelled", "interrupted", "unknown", "error"), "red"),
}


def grid(*columns: str, right: Collection[str] = ()) -> Table:
    """A table without rules. Long cells are folded where the terminal is too narrow.

    Args:
        columns: their names; without any name, the table has no header.
        right: names of the columns that are right-aligned.
    """
    table = Table(box=None, show_header=any(columns), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name in right else "left")
    return table


def styled(state: str) -> Text:
    """A state in its colour."""
    return Text(state, style=STYLES.get(state, "bold"))
