"""Reads the rows of a local data file one after the other, each with its place.

A file that cannot be read is one error, with the line and the column where they are known. Nothing is kept in
memory but the row, the batch of a parquet file, or the text of a JSON array.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import errno
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError

Row = dict[str, Any]
Placed = tuple[str, Row]  # a row after its place, such as data.jsonl:3

_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_ROWS = 'each line of a .jsonl file is one row, such as {"prompt": "…", "chosen": "…"}'
# Rows at the start of a JSON file whose columns all its rows have: those that a row lacks are null.
_FIRST = 1000
_BATCH = 256

csv.field_size_limit(sys.maxsize)


def kind_of(path: Path) -> str | None:
    """What a file is by its name without .gz and the like: json, csv, parquet or arrow; None if it shows nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSED]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def read_rows(path: Path) -> Iterator[Placed]:
    """The rows of a file, in order.

    Raises:
        HpcRlhfError: the file cannot be read, from here on.
    """
    kind = kind_of(path)
    if kind is None:
        raise HpcRlhfError(
            f"the name {path.name} does not show what kind of file it is",
            where=str(path),
            hint="use .json, .jsonl, .csv, .parquet or .arrow, compressed or not",
        )
    try:
        if path.stat().st_size == 0:
            raise HpcRlhfError("the data file is empty", where=str(path), hint="remove it, or copy it again")
        yield from _READERS[kind](path)
    except HpcRlhfError:
        raise
    except OSError as error:
        theirs = error.errno in (None, errno.EACCES, errno.EPERM, errno.ENOENT)  # gzip raises it without a number
        raise HpcRlhfError(
            f"the file cannot be read: {error.strerror or error}",
            where=str(path),
            exit_code=INPUT_WRONG if theirs else RUN_FAILED,
        ) from error
    except Exception as error:  # decompressors and pyarrow raise a dozen types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "it may be damaged or not completely copied; compare its size and checksum with the original"
        raise HpcRlhfError(f"the file cannot be read: {reason}", where=str(path), hint=hint) from error


def _open(path: Path) -> BinaryIO:
    """The content of a file, decompressed if it is compressed, whatever its name says."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(_ZSTD):
        if find_spec("zstandard") is None:
            hint = "pip install zstandard, or decompress the file: unzstd FILE"
            raise HpcRlhfError("reading .zst needs the package zstandard", where=str(path), hint=hint)
        return io.BufferedReader(import_module("zstandard").open(path, "rb"))
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)
    return io.BufferedReader(opener(path, "rb"))


def _lines(path: Path, ends: str | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers; UTF-8 unless the file begins with a mark of another encoding.

    Args:
        ends: as ``newline`` of ``open``.

    Raises:
        HpcRlhfError: a line is not in that encoding.
    """
    number = 0
    with _open(path) as file:
        start = file.peek(4)  # type: ignore[attr-defined]
        encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), "utf-8")
        try:
            text = io.TextIOWrapper(file, encoding, "surrogateescape", newline=ends)
            for number, line in enumerate(text, 1):
                if not line.isascii():
                    line.encode()
                yield number, line
        except UnicodeEncodeError as error:
            place, byte = f"{path}:{number}:{error.start + 1}", ord(error.object[error.start]) - 0xDC00
            raise _not_text(place, f"the byte 0x{byte:02x} is not {encoding.upper()}") from error
        except UnicodeDecodeError as error:
            raise _not_text(f"{path}:{number + 1}", f"the line is not {encoding.upper()} ({error.reason})") from error


def _not_text(where: str, what: str) -> HpcRlhfError:
    return HpcRlhfError(what, where, "convert the file to UTF-8, such as from latin-1: iconv -f latin1 -t utf-8 FILE")


def _json(path: Path) -> Iterator[Placed]:
    """Rows of JSON lines, of an array of rows, or of an object with a list for each column."""
    lines = _lines(path)
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
            yield where, _checked(_loaded(json.loads, line, path, number), line, where)


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
            found = _LONE_SURROGATE.search(text)
            raise HpcRlhfError(
                f"the escape {found[0] if found else 'of a surrogate'} is half a character",
                where=f"{where}:{found.start() + 1}" if found else where,
                hint="write the whole pair of escapes, or the character itself",
            ) from error
    return row


def _array(path: Path, text: str) -> Iterator[Placed]:
    """The rows of a JSON array; a row that is text has the column ``text``."""
    decoder, number, place = json.JSONDecoder(), 0, text.index("[") + 1
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
    columns = _checked(_loaded(json.loads, text, path), text, str(path))
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


def _csv(path: Path) -> Iterator[Placed]:
    """The rows of a csv file; every cell is text, such as None, 007 or 2026-01-31."""
    reader = csv.reader((line for _, line in _lines(path, ends="")), strict=True)
    header: list[str] | None = None
    first = 1
    try:
        for cells in reader:
            where, first = f"{path}:{first}", reader.line_num + 1
            if not cells or (len(cells) == 1 != len(header or ()) and not cells[0].strip()):
                continue  # a blank line
            if header is None:
                header = cells
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise HpcRlhfError(f"the header has the column {twice!r} twice", where)
                continue
            if len(cells) > len(header):
                what = f"the row has {len(cells)} cells and the header {len(header)}"
                raise HpcRlhfError(what, where, 'put text with commas in quotes, and write " in it as ""')
            yield where, dict.fromkeys(header) | dict(zip(header, cells))  # noqa: B905, a short row ends with nulls
    except csv.Error as error:
        hint = 'put text with commas, quotes or line ends in quotes, and write " in it as ""'
        raise HpcRlhfError(f"the row is not valid csv: {error}", f"{path}:{first}", hint) from error


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow.parquet as pq

    with _open(path) as file, pq.ParquetFile(file) as table:
        yield from _of_batches(path, table.iter_batches(_BATCH))


def _arrow(path: Path) -> Iterator[Placed]:
    import pyarrow as pa

    with _open(path) as file:
        is_file = file.peek(6).startswith(b"ARROW1")  # type: ignore[attr-defined]
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        yield from _of_batches(path, batches, checks=True)


def _of_batches(path: Path, batches: Iterator[Any], checks: bool = False) -> Iterator[Placed]:
    """The rows of batches.

    Args:
        checks: the batches are as they are in the file, where a wrong offset would crash Python.
    """
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            if checks:
                part.validate(full=True)
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError as error:
                raise HpcRlhfError(_undecodable(part, number), str(path), "write the column again, as UTF-8") from error
            for row in rows:
                yield f"{path}, row {number}", row
                number += 1


def _undecodable(batch: Any, first: int) -> str:
    """Where a batch, whose first row has this number, has text that is not UTF-8."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for number, value in enumerate(column, first):
            try:
                value.as_py()
            except UnicodeDecodeError:
                return f"the column {name} is not UTF-8 in row {number}"
    return "a column is not UTF-8"


_READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
