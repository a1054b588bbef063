"""The documents of a source of plain text, in parts that can be read independently of each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.row_counts import Outcome
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages.pretrain import FilterSpec
from hpc_rlhf.train.data.files import Placed, read_rows
from hpc_rlhf.train.data.formats import read_row
from hpc_rlhf.train.data.messages import Dropped
from hpc_rlhf.train.data.sources import generate, load, local_files
from hpc_rlhf.train.data.text_filters import refused

# The size of a part: bytes of small files, which are read together, or rows of the hub.
PART_BYTES, PART_ROWS = 2**26, 100_000


@dataclass(frozen=True)
class Part:
    """Some files of a local source, with their sizes in bytes and when they were changed, in nanoseconds; or the rows
    of another from ``first`` on."""

    files: tuple[tuple[str, int, int], ...] = ()
    first: int = 0
    rows: int = 0

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Part:
        """Read back from JSON."""
        return cls(tuple(map(tuple, facts["files"])), facts["first"], facts["rows"])

    def now(self) -> Part:
        """The same part with its files as they are now. A file that is gone stays as it was."""
        files = (_stat(Path(path)) if Path(path).is_file() else (path, *was) for path, *was in self.files)
        return replace(self, files=tuple(files))  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise HpcRlhfError if a file is not as it was."""
        for was, is_now in zip(self.files, self.now().files, strict=True):
            if was != is_now or not Path(was[0]).is_file():
                what = "the file has changed, or is gone, since it was tokenized, and its tokens were damaged later"
                raise HpcRlhfError(what, where=was[0], hint="put it back, or start a new run")


class Document(NamedTuple):
    """A row of a source: its place, and its text, or why it is left out; and how many lines the text lacks."""

    where: str
    text: str
    outcome: Outcome | None
    lines: int = 0


def parts_of(source: SourceSpec) -> list[Part]:
    """The parts of a source, in order.

    Raises:
        HpcRlhfError: it cannot be found.
    """
    if source.generated is not None:
        return [Part(rows=source.generated)]
    files = local_files(source)
    if files is None:
        rows = len(load(source))  # type: ignore[arg-type]
        return [Part(first=n, rows=min(PART_ROWS, rows - n)) for n in range(0, max(1, rows), PART_ROWS)]
    parts: list[Part] = []
    group: list[tuple[str, int, int]] = []
    for file in files:
        group.append(_stat(file))
        if sum(size for _, size, _ in group) >= PART_BYTES:
            parts.append(Part(tuple(group)))
            group = []
    return [*parts, Part(tuple(group))] if group else parts


def _stat(file: Path) -> tuple[str, int, int]:
    facts = file.stat()
    return str(file), facts.st_size, facts.st_mtime_ns


def documents(source: SourceSpec, part: Part, seed: int, rules: FilterSpec) -> Iterator[Document]:
    """The rows of a part, in order, as documents. Those that break a rule are left out.

    Raises:
        HpcRlhfError: they cannot be read, from here on.
    """
    for where, row in _rows(source, part, seed):
        try:
            sample = read_row(row, source.row_format, where, source.columns)
        except Dropped as dropped:
            yield Document(where, "", dropped.outcome)
        else:
            text = sample.prompt + sample.chosen
            yield Document(where, text, refused(text, rules))


def _rows(source: SourceSpec, part: Part, seed: int) -> Iterator[Placed]:
    if part.files:
        return chain.from_iterable(read_rows(Path(path)) for path, *_ in part.files)
    if source.generated is not None:
        rows: Any = generate(source, seed)
    else:
        rows = load(source).select(range(part.first, part.first + part.rows))  # type: ignore[attr-defined]
    return ((f"{source.name}, row {number}", row) for number, row in enumerate(rows, part.first))
