"""The cells of a row, under the names that its format has for them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

# The names of columns that hold a response or a prompt, or parts of such names.
RESPONSES = re.compile(r"answers?|responses?|reply|replies|completions?|chosen|rejected|outputs?|solutions?|\btext")
PROMPTS = re.compile(r"prompts?|questions?|instructions?|query|queries|inputs?|contexts?|history|post|problem|system")
DIALOGUES = re.compile(r"messages?|conversations?|dialogues?")
# A text of this many words is more than a name, a category or a time.
_WORDS = 4


class Cells:
    """A row's cells, and which of its columns nobody has read.

    Args:
        row: by the columns of the file.
        columns: the column of each cell that has another name in the file.
        known: the cells that the format reads. Others in ``columns`` are for rewards only.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], known: Container[str]) -> None:
        self.row, self.columns, self.read = row, columns, set[str]()
        self.unread = set(row) - {columns[name] for name in columns if name not in known}
        missing = next((name for name in columns if columns[name] not in row), None)
        if missing is not None:
            raise ValueError(f"the column {columns[missing]}, which is its {missing}, is missing")

    def __contains__(self, name: str) -> bool:
        return self.columns.get(name, name) in self.row

    def first(self, *names: str) -> str:
        """The first of these that the spec names a column for, or else that the row has, or else the last."""
        return next((name for name in names if name in self.columns), next(filter(self.__contains__, names), names[-1]))

    def get(self, name: str) -> Any:
        """A cell; None if the row does not have it."""
        return self[name] if name in self else None  # noqa: SIM401, it is what `get` calls

    def __getitem__(self, name: str) -> Any:
        column = self.columns.get(name, name)
        self.read.add(name)
        self.unread.discard(column)
        return self.row[column]

    @property
    def further(self) -> dict[str, Any]:
        """What the format has not read: the cells that the spec names, and the other columns under their own names."""
        named = {name: self.row[column] for name, column in self.columns.items() if name not in self.read}
        other = {column: cell for column, cell in self.row.items() if column not in self.read}
        return {column: cell for column, cell in other.items() if column not in self.columns.values()} | named

    def text(self, name: str) -> str | None:
        """A cell that must be text, a number, a date or null.

        Raises:
            KeyError: the row does not have it.
            ValueError: it is something else.
        """
        text = as_text(self[name])
        if isinstance(text, list):
            raise ValueError(f"{self.columns.get(name, name)} is a list; for lists of messages, set format: messages")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{self.columns.get(name, name)} is not text but of type {type(text).__name__}")
        return text

    def number(self, name: str) -> float | None:
        """A cell that is a finite number or its text; None if it is not, or the row does not have it."""
        try:
            number = float(math.nan if isinstance(cell := self.get(name), bool) else cell)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None

    def lacks(self, names: re.Pattern[str], *known: str) -> bool:
        """Whether the row has none of the cells ``known``, nor text in another column that seems to be one of them."""
        if any(map(self.__contains__, known)):
            return False
        unread = {column: self.row[column] for column in self.unread}
        return not any(_is_named(column, cell, names, DIALOGUES) for column, cell in unread.items())

    def ignored(self, read: str) -> list[str]:
        """The columns that nobody has read although they look like content.

        Args:
            read: the text that was read. A column that repeats a part of it is not content of its own.
        """
        columns = []
        for column in sorted(self.unread):
            cell, words = self.row[column], _words(self.row[column])
            is_content = words >= _WORDS or (words and _is_named(column, None, RESPONSES, PROMPTS, DIALOGUES))
            if is_content and not (isinstance(cell, str) and cell.strip() in read):
                columns.append(column)
        return columns


def as_text(cell: Any) -> Any:
    """A number or a date as text, and NaN as null; anything else as it is."""
    if isinstance(cell, bool):
        return cell
    if isinstance(cell, (float, Decimal)) and cell != cell:
        return None
    return str(cell) if isinstance(cell, (int, float, Decimal, date, time)) else cell


def as_list(cell: Any, what: str) -> list[Any]:
    """A list, or the JSON of one.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise ValueError(f"a list of {what} was expected, or its JSON") from None
    if not isinstance(cell, list):
        raise ValueError(f"a list of {what} was expected, or its JSON")
    return cell


def _is_named(column: str, cell: Any, *names: re.Pattern[str]) -> bool:
    """Whether a column with one of these names, or with text and a name that contains one, is meant."""
    matches = [match for pattern in names if (match := pattern.search(column.lower()))]
    return any(match[0] == column.lower() for match in matches) or (bool(matches) and _words(cell) > 1)


def _words(cell: Any) -> int:
    """How many words a cell has: a text, or all texts and messages in a list."""
    if isinstance(cell, dict):
        return sum(_words(cell[key]) for key in ("content", "value", "text") if key in cell)
    if isinstance(cell, list):
        return sum(map(_words, cell))
    return len(as_text(cell).split()) if isinstance(as_text(cell), str) else 0
