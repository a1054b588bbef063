"""The rows of a local JSON file: JSON lines, an array of rows, or an object with a list per column."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data.text_lines import numbered_lines

Row = dict[str, Any]
Placed = tuple[str, Row]  # a row after its place, such as data.jsonl:3
_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_ROWS = 'each line of a .jsonl file is one row, such as {"prompt": "…", "chosen": "…"}'
# Every row has the columns of this many first rows: null where it lacks one.
_FIRST = 1000


class _Written(float):
    """A number with its text, because an answer 1.50 is not 1.5."""

    def __new__(cls, text: str) -> _Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


_load = partial(json.loads, parse_float=_Written)


def read_json(path: Path) -> Iterator[Placed]:
    """Read a file's rows in order.

    Raises:
        HpcRlhfError: it does not hold rows, from here on.
    """
    lines = numbered_lines(path)
    blank: list[tuple[int, str]] = []
    for first in lines:
        blank.append(first)
        if first[1].strip():
            break
    start = blank[-1][1].lstrip()
    whole = start.startswith("[") or (start and ".jsonl" not in path.suffixes and not _is_json(start))
    if whole:
        text = "".join(line for _, line in chain(blank, lines))
        rows = _array(path, text) if start.startswith("[") else _columns(path, text)
    else:
        rows = _json_lines(path, chain(blank, lines))
    return _with_all_columns(rows)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Placed]:
    for number, line in lines:
        if line.strip():
            where = f"{path}:{number}"
            yield where, _checked(_loaded(_load, line, path, number), line, where)


def _loaded(load: Callable[[str], Any], text: str, path: Path, first_line: int = 1) -> Any:
    """What a JSON text holds.

    Raises:
        HpcRlhfError: it is not JSON.
    """
    try:
        return load(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1 :][:1]
        what = f"the line is not a JSON object: {error.msg}: {''.join(line)[max(0, error.colno - 30) :][:60].strip()!r}"
        if "\0" in text:
            what = "the line holds NUL bytes: the file is UTF-16 without a mark, or was not completely written"
        raise HpcRlhfError(what, f"{path}:{first_line + error.lineno - 1}:{error.colno}", _ROWS) from error
    except (ValueError, RecursionError) as error:  # a number of many digits, or nested too deeply
        raise HpcRlhfError(f"the line is not a JSON object: {error}", f"{path}:{first_line}", _ROWS) from error


def _checked(row: Any, text: str, where: str) -> Row:
    """A row that is an object whose texts can be written as UTF-8."""
    if not isinstance(row, dict):
        raise HpcRlhfError(f"the line is not a JSON object: {text.strip()[:60]!r}", where, _ROWS)
    if "\\u" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            surrogate = _LONE_SURROGATE.search(text)
            raise HpcRlhfError(
                f"the escape {surrogate[0] if surrogate else 'of a surrogate'} is half a character",
                where=f"{where}:{surrogate.start() + 1}" if surrogate else where,
                hint="write the whole pair of escapes, or the character itself",
            ) from error
    return row


def _array(path: Path, text: str) -> Iterator[Placed]:
    """The rows of a JSON array; a row that is text has the column ``text``."""
    decoder, number, place = json.JSONDecoder(parse_float=_Written), 0, text.index("[") + 1
    space = re.compile(r"\s*")

    def after_space(place: int) -> int:
        match = space.match(text, place)
        return match.end() if match else place

    def refused(place: int, expected: str) -> HpcRlhfError:
        error = json.JSONDecodeError(f"Expecting {expected}", text, place)
        return HpcRlhfError(f"the file is not a JSON array: {error.msg}", f"{path}:{error.lineno}:{error.colno}")

    place = after_space(place)
    if text[place : place + 1] == "]":
        return
    while True:
        try:
            row, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            what = f"the file is not a JSON array: {error.msg}"
            raise HpcRlhfError(what, f"{path}:{error.lineno}:{error.colno}") from error
        where = f"{path}, row {number}"
        yield where, _checked({"text": row} if isinstance(row, str) else row, text[place:end], where)
        number, end = number + 1, after_space(end)
        if text[end : end + 1] == "]":
            if after_space(end + 1) != len(text):
                raise refused(end + 1, "the end of the file")
            return
        if text[end : end + 1] != ",":
            raise refused(end, "',' or ']'")
        place = after_space(end + 1)


def _columns(path: Path, text: str) -> Iterator[Placed]:
    """The rows of a JSON object that has a list for each column."""
    columns = _checked(_loaded(_load, text, path), text, str(path))
    sizes = {len(values) if isinstance(values, list) else None for values in columns.values()}
    if len(sizes) != 1 or None in sizes:
        raise HpcRlhfError("the file is neither rows nor an object with a list for each column", str(path), _ROWS)
    for number, values in enumerate(zip(*columns.values(), strict=True)):
        yield f"{path}, row {number}", dict(zip(columns, values, strict=True))


def _with_all_columns(rows: Iterator[Placed]) -> Iterator[Placed]:
    """Rows with null for the columns that only others have; columns of the first rows count for all."""
    first = list(islice(rows, _FIRST))
    columns: Row = {name: None for _, row in first for name in row}
    for where, row in chain(first, rows):
        for name in row:
            columns.setdefault(name)
        yield where, {**columns, **row}
