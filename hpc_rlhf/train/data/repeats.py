"""Finds repeated documents by 64-bit hashes, in little memory.

Two different documents of a hundred million have the same hash in one of 3,700 sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from hpc_rlhf.run.files import fsync_path, replacing

# Hashes that are compared at a time.
COMPARED = 2**22


def write_hashes(path: Path, texts: Iterable[str | None]) -> None:
    """Write a hash for every row of a part: 0 for a row without text."""
    hashes = np.fromiter((0 if text is None else hash_of(text) for text in texts), np.uint64)
    _write(path, hashes)


def hash_of(text: str) -> int:
    """A hash of a text from 1 to 2**64 - 1."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def mark(hashes: Sequence[Path], marks: Sequence[Path]) -> None:
    """Write whether each row repeats the text of one before it, as packed bits.

    Args:
        hashes, marks: a file for each part, in order.
    """
    parts = [np.memmap(path, np.uint64, "r") if path.stat().st_size else np.empty(0, np.uint64) for path in hashes]
    starts = np.cumsum([0, *map(len, parts)])
    again = np.zeros(starts[-1], dtype=bool)
    slices = max(1, -(-len(again) // COMPARED))
    for number in range(slices):
        own = [np.flatnonzero(part % np.uint64(slices) == number) for part in parts]
        rows = np.concatenate([start + places for start, places in zip(starts[:-1], own, strict=True)])
        values = np.concatenate([part[places] for part, places in zip(parts, own, strict=True)])
        first = np.unique(values, return_index=True)[1]
        repeats = np.ones(len(rows), dtype=bool)
        repeats[first] = False
        again[rows] = repeats & (values != 0)
    for path, start, end in zip(marks, starts[:-1], starts[1:], strict=True):
        _write(path, np.packbits(again[start:end]))


def read_marks(path: Path, rows: int) -> np.ndarray:
    """(rows,), bool: what ``mark`` wrote."""
    return np.unpackbits(np.fromfile(path, np.uint8), count=rows).astype(bool)


def _write(path: Path, array: np.ndarray) -> None:
    with replacing(path) as partial:
        array.tofile(partial)
        fsync_path(partial)
