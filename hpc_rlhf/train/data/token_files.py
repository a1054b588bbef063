"""Documents as tokens in segments: files that are written once, verified, and memory-mapped.

A segment has the documents of some rows of a part of a source, first those to train on, then those held out.
NAME.tokens has their tokens (uint16, or uint32 for large vocabularies), NAME.ends where each document ends (uint32),
and NAME.json, which is written last, the hashes of both and what is in them. What is in a segment depends only on the
source, so a part that is continued after its last segment ends in the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from hpc_rlhf.run.files import fsync_path, replacing, write_atomically
from hpc_rlhf.run.manifest import sha256 as file_sha256
from hpc_rlhf.run.row_counts import SourceCounts
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled

SPLITS = ("train", "held_out")
# Tokens at which a segment ends, with the document that reaches them.
SEGMENT = 2**24


@dataclass
class Segment:
    """A segment in the making: the token ids of its documents, by split."""

    counts: SourceCounts
    documents: dict[str, list[np.ndarray]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    size: int = 0

    def add(self, ids: np.ndarray, split: str) -> None:
        self.documents[split].append(ids)
        self.size += len(ids)

    def write(self, stem: Path, rows: int, ends_part: bool) -> dict[str, Any]:
        """Write its files; returns the facts in the last of them.

        Args:
            rows: rows of the part up to the end of this segment.
            ends_part: it is the last of the part.
        """
        documents = [ids for split in SPLITS for ids in self.documents[split]]
        tokens = np.concatenate(documents) if documents else np.empty(0, np.uint16)
        arrays = {"tokens": tokens, "ends": np.cumsum([len(ids) for ids in documents], dtype=np.uint32)}
        files = {}
        for kind, array in arrays.items():
            path = _file(stem, kind)
            with replacing(path) as partial:  # what an attempt that still runs has mapped stays
                array.tofile(partial)
                fsync_path(partial)
            files[path.name] = {"bytes": array.nbytes, "sha256": sha256(array.data).hexdigest()}
        sizes = {split: {"documents": len(ids), "tokens": sum(map(len, ids))} for split, ids in self.documents.items()}
        facts = {"name": stem.name, "rows": rows, "ends_part": ends_part, **sizes, "files": files}
        facts["counts"] = self.counts.to_dict()
        write_atomically(_file(stem, "json"), json.dumps(facts), durable=True)
        fsync_path(stem.parent)
        return facts


def _file(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}")


def stem_of(folder: Path, part: int, number: int) -> Path:
    return folder / f"part-{part:05}-{number:05}"


def discard(folder: Path, part: int) -> None:
    """Delete the segments of a part."""
    for path in folder.glob(f"part-{part:05}-*"):
        path.unlink()


def intact(folder: Path, part: int, should_stop: Callable[[], bool] = bool) -> tuple[list[dict[str, Any]], str | None]:
    """The segments of a part up to the first that is missing or damaged: their facts, and what is wrong with the
    damaged one.

    Raises:
        WorkCancelled: ``should_stop`` was true.
    """
    segments: list[dict[str, Any]] = []
    while not (segments and segments[-1]["ends_part"]):
        if should_stop():
            raise WorkCancelled
        stem = stem_of(folder, part, len(segments))
        try:
            facts = json.loads(_file(stem, "json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return segments, None
        except ValueError:
            return segments, f"{stem.name}.json is not JSON"
        for name, expected in facts["files"].items():
            path = folder / name
            if (
                not path.is_file()
                or path.stat().st_size != expected["bytes"]
                or file_sha256(path) != expected["sha256"]
            ):
                return segments, f"{name} differs from its SHA-256"
        segments.append(facts)
    return segments, None


class TokenStream:
    """All documents of one split of a source, one after the other, memory-mapped.

    Args:
        segments: the facts of all segments, in order.
    """

    def __init__(self, folder: Path, segments: Sequence[dict[str, Any]], split: str, dtype: str) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.segments = [each for each in segments if each[split]["tokens"]]
        held_out = split != SPLITS[0]
        # Where a segment's tokens and documents of this split begin in its files.
        self.first = [(each[SPLITS[0]]["tokens"], each[SPLITS[0]]["documents"]) for each in self.segments]
        self.first = self.first if held_out else [(0, 0)] * len(self.segments)
        self.documents = [each[split]["documents"] for each in self.segments]
        self.starts = np.cumsum([0, *(each[split]["tokens"] for each in self.segments)], dtype=np.int64)
        self._mapped = lru_cache(maxsize=256)(self._map)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _map(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        stem = self.folder / self.segments[number]["name"]
        tokens, ends = (
            np.memmap(_file(stem, kind), dtype, "r") for kind, dtype in (("tokens", self.dtype), ("ends", np.uint32))
        )
        return tokens, ends

    def read(self, first: int, last: int) -> tuple[np.ndarray, list[int]]:
        """The tokens from ``first`` to before ``last``: (tokens,), int64, and how many are of each document."""
        pieces = list(self._pieces(first, last))
        lengths = [length for _, own in pieces for length in own]
        return np.concatenate([ids for ids, _ in pieces]).astype(np.int64), lengths

    def _pieces(self, first: int, last: int) -> Iterator[tuple[np.ndarray, list[int]]]:
        number = int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < last:
            tokens, ends = self._mapped(number)
            (token, document), start = self.first[number], int(self.starts[number])
            begin, end = first - start + token, min(last, int(self.starts[number + 1])) - start + token
            own = ends[document : document + self.documents[number]]
            inner = own[np.searchsorted(own, begin, side="right") : np.searchsorted(own, end, side="left")]
            yield tokens[begin:end], np.diff([begin, *inner.tolist(), end]).tolist()
            first, number = end - token + start, number + 1
