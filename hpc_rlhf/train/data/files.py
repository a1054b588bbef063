"""Reads the rows of a local data file one after the other, each with its place.

A file that cannot be read is one error, with the line and the column where they are known. Nothing is kept in
memory but the row, the batch of a parquet file, or the text of a JSON array.
"""

from __future__ import annotations

import csv
import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.data.json_rows import Placed, read_json
from hpc_rlhf.train.data.text_lines import numbered_lines, open_content

_KINDS = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BATCH = 256
# Characters of a row of a text file, roughly.
_TEXT_ROW = 2**20

csv.field_size_limit(sys.maxsize)


def kind_of(path: Path) -> str | None:
    """What a file is by its name without .gz and the like: json, csv, parquet, arrow or text; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSED]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def read_rows(path: Path) -> Iterator[Placed]:
    """Read a file's rows in order.

    Raises:
        HpcRlhfError: the file cannot be read, from here on.
    """
    kind = kind_of(path)
    if kind is None:
        raise HpcRlhfError(
            f"the name {path.name} does not show what kind of file it is",
            where=str(path),
            hint="use .json, .jsonl, .csv, .parquet, .arrow or .txt, compressed or not",
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


def _csv(path: Path) -> Iterator[Placed]:
    """The rows of a csv file; every cell is text, such as None, 007 or 2026-01-31."""
    reader = csv.reader((line for _, line in numbered_lines(path, ends="")), strict=True)
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


def _text(path: Path) -> Iterator[Placed]:
    """A text file as one row, or as rows of whole lines if it is long."""
    first, lines, size = 1, list[str](), 0
    for number, line in numbered_lines(path):
        lines.append(line)
        size += len(line)
        if size >= _TEXT_ROW:
            yield f"{path}:{first}", {"text": "".join(lines)}
            first, lines, size = number + 1, [], 0
    if lines:
        yield f"{path}:{first}", {"text": "".join(lines)}


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow.parquet as pq

    with open_content(path) as file, pq.ParquetFile(file) as table:
        yield from _of_batches(path, table.iter_batches(_BATCH))


def _arrow(path: Path) -> Iterator[Placed]:
    import pyarrow as pa

    with open_content(path) as file:
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
    "json": read_json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "text": _text,
}
