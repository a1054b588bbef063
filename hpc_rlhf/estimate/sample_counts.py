"""How many samples a stage is going to have, where that can be told without reading the data."""

from __future__ import annotations

import csv
import glob
import gzip
import json
from collections.abc import Callable
from pathlib import Path

from hpc_rlhf.spec import hub
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec

# Larger files are not read through to count their lines.
_COUNTED = 2**29


def expected_samples(spec: JobSpec, stage: str) -> int | None:
    """Samples that a stage trains on, about: prompts are drawn to stages by their hashes, and unusable rows are left out.

    None where the stage takes no data, or a source is on the hub and not in the cache, or in files whose rows are not counted fast.
    """
    total = sum(spec.shares.values())
    if stage not in spec.shares or not total:
        return None
    rows = 0.0
    for source in spec.data.sources:
        try:
            count = _rows(source)
        except (OSError, ValueError, csv.Error):  # what cannot be read is the doctor's business
            return None
        if count is None:
            return None
        rows += count * source.weight
    return round(rows * spec.shares[stage] / total * (1 - spec.data.held_out))


def _rows(source: SourceSpec) -> int | None:
    if source.demo is not None:
        return source.demo
    path = Path(source.path or "")
    if not path.exists():
        return _prepared(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    counters = [_counter(file) for file in files]
    if not files or None in counters or sum(map(_size, files)) > _COUNTED:
        return None
    return sum(count(file) for count, file in zip(counters, files, strict=True) if count)


def _counter(path: Path) -> Callable[[Path], int] | None:
    """What counts the rows of a file of this name; None where that takes reading it whole."""
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if suffix == ".parquet":
        return _parquet_rows
    return {".jsonl": _lines, ".csv": _records}.get(suffix) if path.is_file() else None


def _size(path: Path) -> int:
    """Bytes to read, about; text is a quarter as large where it is compressed, and tables of columns are not read."""
    return 0 if path.suffix == ".parquet" else path.stat().st_size * (4 if path.suffix == ".gz" else 1)


def _lines(path: Path) -> int:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _records(path: Path) -> int:
    """Rows of a table whose first line has the names; text in quotes may have lines of its own."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        return max(0, sum(1 for record in csv.reader(file) if record) - 1)


def _parquet_rows(path: Path) -> int:
    from pyarrow.parquet import read_metadata

    return int(read_metadata(path).num_rows)


def _prepared(source: SourceSpec) -> int | None:
    """Rows of a hub data set that ``prefetch`` or an earlier run has brought into the cache of datasets."""
    cache = hub.folder("data set")
    name = (source.path or "").replace("/", "___")
    counts = set()
    for info in cache.glob(
        f"{glob.escape(name)}/{glob.escape(source.subset or '') or '*'}/*/*/dataset_info.json"
    ):
        split = json.loads(info.read_text(encoding="utf-8")).get("splits", {}).get(source.split)
        if split:
            counts.add(int(split["num_examples"]))
    return counts.pop() if len(counts) == 1 else None
