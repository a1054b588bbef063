"""How many samples a stage will have, if that can be counted without reading the data."""

from __future__ import annotations

import csv
import glob
import gzip
import json
from collections.abc import Callable
from pathlib import Path

from hpc_rlhf.run import feedback
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import Data, PretrainSpec, kind_of

_COUNTED_VOTES = {"pairs": ("left", "right"), "thumbs": ("up", "down")}
# Formats in which a row always has two responses, each of which is a labeled one.
_PAIRS = ("hh", "vote")
# Larger files are not read to count their lines.
_COUNTED = 2**29
# Bytes of text in a token of a large vocabulary, and in a byte of a compressed file, roughly.
_TOKEN, _COMPRESSED = 4, 3


def expected_samples(spec: JobSpec, stage: str) -> int | None:
    """Approximate samples of a stage: hashes assign prompts to stages, and unusable rows are skipped.

    None if the stage takes no data, or a source is not in the cache of the hub or cannot be counted fast.
    """
    pretraining = spec.stage(stage)
    if isinstance(pretraining, PretrainSpec):
        return _sequences(pretraining)
    total = sum(spec.shares.values())
    if stage not in spec.shares or not total:
        return None
    rows = 0.0
    for source in spec.data.sources:
        try:
            count = _rows(source)
        except (OSError, ValueError, csv.Error):  # unreadable files are the doctor's task
            return None
        if count is None:
            return None
        both = kind_of(stage).data is Data.LABELED and (source.demo or source.row_format in _PAIRS)
        rows += count * source.weight * (2 if both else 1)
    return round(rows * spec.shares[stage] / total * (1 - spec.data.held_out))


def _sequences(stage: PretrainSpec) -> int | None:
    """Sequences of local text, by the sizes of its files; a column of a file counts as all of it."""
    tokens = 0.0
    for source in stage.sources:
        path = Path(source.path or "")
        if source.path is None or not path.exists():
            return None
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        whole = sum(
            file.stat().st_size * (1 if file.suffix in (".jsonl", ".json", ".csv", ".txt") else _COMPRESSED)
            for file in files
        )
        tokens += whole / _TOKEN * source.weight
    return max(1, round(tokens * (1 - stage.held_out) / stage.sequence_length))


def _rows(source: SourceSpec) -> int | None:
    if source.generated is not None:
        return source.generated
    if source.feedback is not None and source.kind is not None:
        votes = (vote for _, vote in feedback.read(RunDir(Path(source.feedback)).feedback) if vote is not None)
        return sum(vote.vote in _COUNTED_VOTES[source.kind] for vote in votes)
    path = Path(source.path or "")
    if not path.exists():
        return _prepared(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    counters = [_counter(file) for file in files]
    if not files or None in counters or sum(map(_size, files)) > _COUNTED:
        return None
    return sum(count(file) for count, file in zip(counters, files, strict=True) if count)


def _counter(path: Path) -> Callable[[Path], int] | None:
    """A function that counts the rows of such a file; None if it would have to parse the whole file."""
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if suffix == ".parquet":
        return _parquet_rows
    return {".jsonl": _lines, ".csv": _records}.get(suffix) if path.is_file() else None


def _size(path: Path) -> int:
    """Bytes to read, approximately.

    Compressed text is about a quarter of its size; parquet files are not read.
    """
    return 0 if path.suffix == ".parquet" else path.stat().st_size * (4 if path.suffix == ".gz" else 1)


def _lines(path: Path) -> int:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _records(path: Path) -> int:
    """Rows of a table whose first line has the names; quoted text may span lines."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        return max(0, sum(1 for record in csv.reader(file) if record) - 1)


def _parquet_rows(path: Path) -> int:
    from pyarrow.parquet import read_metadata

    return int(read_metadata(path).num_rows)


def _prepared(source: SourceSpec) -> int | None:
    """Rows of a hub data set that ``prefetch`` or an earlier run has put into the cache of datasets."""
    cache = hub.folder("data set")
    name = (source.path or "").replace("/", "___")
    counts = set()
    for info in cache.glob(f"{glob.escape(name)}/{glob.escape(source.subset or '') or '*'}/*/*/dataset_info.json"):
        split = json.loads(info.read_text(encoding="utf-8")).get("splits", {}).get(source.split)
        if split:
            counts.add(int(split["num_examples"]))
    return counts.pop() if len(counts) == 1 else None
