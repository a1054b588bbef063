"""The parts of a source of plain text, each read, tokenized and stored by one rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpc_rlhf.run import manifest
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from hpc_rlhf.spec.stages import PretrainSpec
from hpc_rlhf.spec.stages.pretrain import FilterSpec
from hpc_rlhf.train.data import common_lines, repeats, token_files
from hpc_rlhf.train.data.common_lines import CommonLines
from hpc_rlhf.train.data.documents import Document, Part, documents, parts_of
from hpc_rlhf.train.data.encoder import Encoder
from hpc_rlhf.train.data.text_filters import refused
from hpc_rlhf.train.data.token_files import Segment, TokenStream
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled

# Characters that are tokenized at a time.
BATCH = 2**20

# What decides which documents and lines are left out, and held out.
_RULES = {"held_out", "deduplicate", "max_line_documents", "filters"}

ShouldStop = Callable[[], bool]


class TextSource:
    """One source's tokens in a folder of their own.

    Attributes:
        folder: named by all that the tokens depend on.
        common_lines: the file of the lines that are left out of all sources.
    """

    def __init__(self, spec: PretrainSpec, number: int, seed: int, encoder: Encoder, data: Path) -> None:
        self.spec, self.source, self.seed, self.encoder = spec, spec.sources[number], seed, encoder
        read = spec.sources if spec.compares_sources else (self.source,)
        sources = [each.model_dump(mode="json", exclude={"weight"}) for each in read]
        rules = spec.model_dump(mode="json", include=_RULES)
        facts = [sources, rules, seed, encoder.hash, token_files.SEGMENT]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = data / f"text-{number}-{digest}"
        self.common_lines = data / f"common-lines-{digest}"
        self._record = self.folder / "parts.json"

    @property
    def is_complete(self) -> bool:
        return manifest.read(self.folder) is not None

    def parts(self) -> list[Part]:
        """The parts of the source as they were when they were recorded, or else as they are."""
        if self._record.exists():
            return [Part.of(facts) for facts in json.loads(self._record.read_text())]
        return parts_of(self.source)

    def record(self, parts: list[Part]) -> None:
        """Keep the parts for later attempts. Removes what killed attempts left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):
            leftover.unlink(missing_ok=True)
        write_atomically(self._record, json.dumps([asdict(part) for part in parts]), durable=True)

    def publish(self, segments: list[dict[str, Any]]) -> None:
        """Write the manifest of all segments, unless it is there."""
        counts = SourceCounts.total([SourceCounts.of(each.pop("counts")) for each in segments])
        files = {name: facts for each in segments for name, facts in each.pop("files").items()}
        facts: dict[str, Any] = {"segments": segments, "sources": [counts.to_dict()], "dtype": self.encoder.dtype}
        if manifest.read(self.folder) != {**facts, "files": files}:
            manifest.write(self.folder, facts, files)
        print(f"hpc-rlhf: text: {counts.summary()}", flush=True)

    def streams(self) -> tuple[TokenStream, TokenStream]:
        """The tokens to train on, and those held out."""
        facts = manifest.require(self.folder, f"the tokenized text of {self.source.name}", deep=False)
        train, held_out = (TokenStream(self.folder, facts["segments"], s, facts["dtype"]) for s in token_files.SPLITS)
        return train, held_out


class TextSample(NamedTuple):
    """A row of a source: its document, the token ids of this, (tokens,), unless it is left out, and what became of
    it."""

    document: Document
    ids: np.ndarray | None
    outcome: Outcome

    def count_in(self, counts: SourceCounts) -> None:
        """Add it to the counts of its source."""
        counts.add(self.outcome, self.document.where)
        if self.ids is not None and self.document.lines:
            counts.add(Outcome.WITHOUT_LINES, self.document.where)
            counts.lines += self.document.lines


@dataclass(frozen=True)
class TextPart:
    """Part ``number`` of a source, and its files."""

    text: TextSource
    number: int
    part: Part

    @property
    def hashes(self) -> Path:
        """The file with the hashes of its documents."""
        return self._file("hashes")

    @property
    def repeats(self) -> Path:
        """The file that marks its documents that are equal to an earlier one."""
        return self._file("repeats")

    @property
    def lines(self) -> Path:
        """The file that counts the lines of its documents, until those that are left out are known."""
        return self._file("lines")

    def _file(self, kind: str) -> Path:
        return self.text.folder / f"part-{self.number:05}-{kind}"

    def _read(self) -> Iterator[Document]:
        return documents(self.text.source, self.part, self.text.seed, self.text.spec.filters)

    def write_hashes(self, should_stop: ShouldStop) -> None:
        """Write the hashes of its documents, unless that is done.

        Raises:
            HpcRlhfError: it cannot be read.
            WorkCancelled: ``should_stop`` was true.
        """
        if not self.hashes.exists():
            rows = until_stopped(self._read(), should_stop)
            repeats.write_hashes(self.hashes, (None if row.outcome else row.text for row in rows))

    def write_lines(self, should_stop: ShouldStop) -> None:
        """Count the lines of its documents, unless that is done. Errors are those of ``write_hashes``."""
        if not self.lines.exists():
            rows = until_stopped(self._first(), should_stop)
            common_lines.write_hashes(self.lines, (row.text for row in rows if row.outcome is None))

    def documents(self) -> Iterator[Document]:
        """Its rows, without documents that repeat an earlier one and without lines that too many have, if the spec says
        so."""
        if self.text.spec.max_line_documents is None:
            return self._first()
        lines = CommonLines(self.text.common_lines)
        return (without_lines(row, lines, self.text.spec.filters) for row in self._first())

    def _first(self) -> Iterator[Document]:
        """Its rows, those that repeat an earlier document left out if the spec says so."""
        if not self.text.spec.deduplicate:
            return self._read()
        marks = repeats.read_marks(self.repeats, self.hashes.stat().st_size // 8)
        return (
            row._replace(outcome=Outcome.REPEATED_TEXT) if again else row
            for row, again in zip(self._read(), marks.tolist(), strict=True)
        )

    def samples(self, should_stop: ShouldStop, first: int = 0) -> Iterator[TextSample]:
        """Its rows from ``first`` on. The next ones are read while some are tokenized.

        Raises:
            HpcRlhfError: it cannot be read.
            WorkCancelled: ``should_stop`` was true.
        """
        rows, seed, share = islice(self.documents(), first, None), self.text.seed, self.text.spec.held_out
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(_batch, rows)
            while batch := coming.result():
                if should_stop():
                    raise WorkCancelled
                coming = reader.submit(_batch, rows)
                ids = iter(self.text.encoder([row.text for row in batch if row.outcome is None]))
                for row in batch:
                    if row.outcome is not None:
                        yield TextSample(row, None, row.outcome)
                    else:
                        is_held_out = seeds.unit(seed, row.text, "held out") < share
                        yield TextSample(row, next(ids), Outcome.HELD_OUT if is_held_out else Outcome.TRAINED)

    def complete(self, should_stop: ShouldStop) -> list[dict[str, Any]]:
        """Verify its segments, and write those that are missing.

        Returns:
            The facts of all of its segments.

        Raises:
            HpcRlhfError: it cannot be read.
            WorkCancelled: ``should_stop`` was true.
        """
        folder, name = self.text.folder, self.text.source.name
        segments, damage = token_files.intact(folder, self.number, should_stop)
        if damage is not None:
            print(f"hpc-rlhf: {damage} in {folder}: it is tokenized again", flush=True)
        if segments and segments[-1]["ends_part"]:
            return segments
        self.part.check()
        rows = segments[-1]["rows"] if segments else 0
        segment = Segment(SourceCounts(name))

        def finish(ends_part: bool) -> None:
            stem = token_files.stem_of(folder, self.number, len(segments))
            segments.append(segment.write(stem, rows, ends_part))

        for sample in self.samples(should_stop, rows):
            rows += 1
            if sample.ids is not None:
                segment.add(sample.ids, token_files.SPLITS[sample.outcome is Outcome.HELD_OUT])
            sample.count_in(segment.counts)
            if segment.size >= token_files.SEGMENT:
                finish(ends_part=False)
                segment = Segment(SourceCounts(name))
        finish(ends_part=True)
        return segments


def without_lines(row: Document, lines: CommonLines, rules: FilterSpec) -> Document:
    """A row without common lines, or left out if nothing remains, or what remains breaks a rule."""
    if row.outcome is not None:
        return row
    text, removed = lines.without(row.text)
    if not removed:
        return row
    outcome = refused(text, rules) if text.strip() else Outcome.COMMON_LINES
    return Document(row.where, text, outcome, removed)


def until_stopped(rows: Iterator[Document], should_stop: ShouldStop) -> Iterator[Document]:
    """The rows; raises WorkCancelled once ``should_stop`` is true."""
    for row in rows:
        if should_stop():
            raise WorkCancelled
        yield row


def _batch(rows: Iterator[Document]) -> list[Document]:
    """The next rows, of about ``BATCH`` characters together; none at the end."""
    batch: list[Document] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.text) + 1
        if size >= BATCH:
            break
    return batch
