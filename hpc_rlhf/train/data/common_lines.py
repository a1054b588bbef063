"""Finds the lines that many documents have by 64-bit hashes, in little memory.

Such lines are left out of all documents, as in CCNet (arXiv 1911.00359, section 3.1) and for Llama 3 (arXiv 2407.21783,
section 3.1.1). Lines are compared without the spaces around them; empty ones stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hpc_rlhf.run.files import fsync_path, replacing
from hpc_rlhf.train.data.repeats import COMPARED, hash_of

# A line of some documents. They stand in runs, each sorted, after an entry with the hash 0 and the length of the run.
_ENTRY = np.dtype([("hash", np.uint64), ("documents", np.uint32)])


def write_hashes(path: Path, texts: Iterable[str]) -> None:
    """Count the lines of some texts, those of a text once."""
    hashes = (line for text in texts for line in {hash_of(line) for line in map(str.strip, text.split("\n")) if line})
    with replacing(path) as partial:
        with partial.open("wb") as file:
            while len(some := np.fromiter(islice(hashes, COMPARED), np.uint64)):
                values, counts = np.unique(some, return_counts=True)
                run = np.zeros(len(values) + 1, _ENTRY)
                run["hash"][1:], run["documents"] = values, [len(values), *counts]
                run.tofile(file)
        fsync_path(partial)


def find(counted: Sequence[Path], most: int, target: Path) -> None:
    """Write the hashes of the lines that more than ``most`` texts have, in order.

    Args:
        counted: the files that ``write_hashes`` wrote.
    """
    runs = [run for path in counted for run in _runs(path)]
    slices = max(1, -(-sum(map(len, runs)) // COMPARED))
    bounds = np.array([2**64 * number // slices for number in range(1, slices)], np.uint64)
    ends = [[0, *np.searchsorted(run["hash"], bounds).tolist(), len(run)] for run in runs]
    with replacing(target) as partial:
        with partial.open("wb") as file:
            for number in range(slices):
                own = [run[end[number] : end[number + 1]] for run, end in zip(runs, ends, strict=True)]
                entries = np.concatenate([np.empty(0, _ENTRY), *own])
                values, places = np.unique(entries["hash"], return_inverse=True)
                documents = np.bincount(places, entries["documents"], minlength=len(values))
                values[documents > most].tofile(file)
        fsync_path(partial)


def _runs(path: Path) -> Iterator[np.ndarray]:
    entries, start = _mapped(path, _ENTRY), 0
    while start < len(entries):
        end = start + 1 + int(entries["documents"][start])
        yield entries[start + 1 : end]
        start = end


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


class CommonLines:
    """The lines that ``find`` wrote."""

    def __init__(self, path: Path) -> None:
        self.hashes = _mapped(path, np.uint64)

    def without(self, text: str) -> tuple[str, int]:
        """A text without such lines, and how many these were."""
        if not len(self.hashes):
            return text, 0
        lines = text.split("\n")
        own = np.array([hash_of(line) if line else 0 for line in map(str.strip, lines)], np.uint64)
        places = np.minimum(np.searchsorted(self.hashes, own), len(self.hashes) - 1)
        common = (self.hashes[places] == own).tolist()
        kept = [line for line, is_common in zip(lines, common, strict=True) if not is_common]
        return "\n".join(kept).strip("\n"), len(lines) - len(kept)
