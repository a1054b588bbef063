"""What data sources yield, on the terminal: tables, histograms of lengths, and rows with their loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from hpc_rlhf.observe.terminal.tables import grid
from hpc_rlhf.run.row_counts import NAMED, Outcome, SourceCounts

_WIDEST = 100  # columns of a histogram where the width has no limit
_LEARNED = "green"
# A piece of a row that is longer is shown without its middle, in characters.
_LONG = 600

Source = Mapping[str, Any]


def draw(data: Mapping[str, Sequence[Source]], width: int, ascii_only: bool, colours: bool) -> Iterator[RenderableType]:
    """What the sources of each stage yield, as ``train/preview.py`` describes it.

    Args:
        colours: what is learned is in colour, and not in brackets.
    """
    for path, sources in data.items():
        yield Text(path, style="bold")
        yield Text()
        yield _splits(sources)
        for source in sources:
            yield Text(f"\n{source['source']}: {source['rows']:,} row{'s' * (source['rows'] != 1)}")
            yield _outcomes(SourceCounts.of(source))
            if source["lengths"]:
                yield Text()
                yield from _histogram(source["lengths"], min(width, _WIDEST), "#" if ascii_only else "█")
            for row in source["shown"]:
                yield from _row(row, colours)
        yield Text()


def _splits(sources: Sequence[Source]) -> RenderableType:
    """The rows and tokens of each source in each split."""
    table = grid("source", "split", "rows", "tokens", "tokens a row", right=("rows", "tokens", "tokens a row"))
    for source in sources:
        for split, count in source["splits"].items():
            mean = f"{count['tokens'] / count['rows']:,.1f}" if count["rows"] else "-"
            table.add_row(source["source"], split, f"{count['rows']:,}", f"{count['tokens']:,}", mean)
    return table


def _outcomes(counts: SourceCounts) -> RenderableType:
    """What became of the rows of a source."""
    table = grid("", "")
    table.columns[0].justify = "right"
    for outcome in (each for each in Outcome if each in counts.outcomes):
        count = counts.outcomes[outcome]
        first = f" (first: {count.first})" if outcome.kind in NAMED else ""
        table.add_row(f"{count.rows:,}", f"{outcome.text}{first}")
    if counts.lines:
        table.add_row(f"{counts.lines:,}", "lines left out in all")
    return Padding(table, (0, 0, 0, 2))


def _histogram(bins: Sequence[Mapping[str, int]], width: int, block: str) -> Iterator[Text]:
    """A line for each bin of lengths, from the shortest sequence to the longest."""
    most = max(each["sequences"] for each in bins)
    names = [f"{each['from']}-{each['below'] - 1}" for each in bins]
    left, right = max(map(len, names)), len(f"{most:,}")
    for name, each in zip(names, bins, strict=True):
        label = f"  {name:>{left}} tokens  {each['sequences']:>{right},}  "
        longest = max(1, width - len(label))
        yield Text(label + block * -(-each["sequences"] * longest // most), no_wrap=True)


def _row(row: Mapping[str, Any], colours: bool) -> Iterator[RenderableType]:
    """The sequences of a row, what is learned in colour or in brackets."""
    for sequence in row["sequences"]:
        yield Text(f"\n  {row['split']}, {sequence['name']}, {sequence['tokens']:,} tokens:", style="dim")
        text = Text()
        for part in sequence["parts"]:
            shown = _shortened(part["text"])
            if part["learned"]:
                text.append(shown if colours else f"[{shown}]", style=_LEARNED if colours else "")
            else:
                text.append(shown)
        yield Padding(text, (0, 0, 0, 4))


def _shortened(text: str) -> str:
    if len(text) <= _LONG:
        return text
    return f"{text[: _LONG // 2]} … {len(text) - _LONG:,} more characters … {text[-_LONG // 2 :]}"
