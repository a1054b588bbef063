"""Rows of token ids in an Arrow file: written in chunks, memory-mapped for reading.

Uses pyarrow alone: importing ``datasets`` takes every rank two thirds of a second and about 50 MiB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

# Samples tokenized, and rows written, at a time; no more than these are in memory.
CHUNK = 1024


class RowFile:
    """An Arrow file to which rows are appended in chunks.

    Args:
        columns: of token ids.
        numbers: columns of numbers.
        texts: columns of text.
    """

    def __init__(
        self, path: Path, columns: tuple[str, ...], numbers: tuple[str, ...] = (), texts: tuple[str, ...] = ()
    ) -> None:
        ids = {f"{name}_ids": pa.list_(pa.int32()) for name in columns}
        others = {**dict.fromkeys(numbers, pa.float32()), **dict.fromkeys(texts, pa.string())}
        self.schema = pa.schema({"prompt": pa.string(), **ids, **others})
        self.writer = pa.ipc.new_stream(str(path), self.schema)
        self.pending: list[dict[str, Any]] = []
        self.rows = 0

    def add(self, row: dict[str, Any]) -> None:
        self.pending.append(row)
        self.rows += 1
        if len(self.pending) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        self.writer.write_batch(pa.RecordBatch.from_pylist(self.pending, schema=self.schema))
        self.pending = []

    def close(self) -> int:
        if self.pending:
            self._flush()
        self.writer.close()
        return self.rows


class Rows:
    """The rows of a file, memory-mapped: each a mapping from column to value.

    Args:
        further: the names of all further columns, which the column ``columns`` has as JSON.
    """

    def __init__(self, path: Path, further: Sequence[str] = ()) -> None:
        self.table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.further = further

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = zip(self.table.column_names, self.table.columns, strict=True)
        row = {name: column[index].as_py() for name, column in columns}
        if "columns" in row:
            row["columns"] = dict.fromkeys(self.further) | json.loads(row["columns"])
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
