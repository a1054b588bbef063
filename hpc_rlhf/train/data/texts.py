"""Pretraining text as tokens, which all ranks write together, once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_rlhf.run import manifest
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from hpc_rlhf.spec.stages import PretrainSpec
from hpc_rlhf.train.data import repeats, token_files
from hpc_rlhf.train.data.documents import Document, Part, documents, parts_of
from hpc_rlhf.train.data.token_files import Segment, TokenStream
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled

if TYPE_CHECKING:
    from hpc_rlhf.train.runtime.world import World

# Characters that are tokenized at a time.
BATCH = 2**20


class Encoder:
    """Documents as token ids: BOS, if there is one, the text, and EOS. Special strings in a text are text."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.end = [tokenizer.eos_token_id]
        self.dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
        self.slow = None if tokenizer.is_fast else tokenizer
        if self.slow is None:
            description = tokenizer.backend_tokenizer.to_str()
            self.fast = Tokenizer.from_str(description)
            self.fast.encode_special_tokens = True
            self.fast.no_padding()
            self.fast.no_truncation()
        else:
            description = json.dumps(sorted(tokenizer.get_vocab().items()))
        self.hash = hashlib.sha256(json.dumps([description, self.start, self.end]).encode()).hexdigest()

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text: (tokens,), in ``dtype``. Uses all cores."""
        ids: Iterable[list[int]]
        if self.slow is None:
            ids = (encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=False))
        else:
            ids = self.slow(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [np.array([*self.start, *each, *self.end], self.dtype) for each in ids]


class TextSource:
    """One source's tokens in a folder of their own.

    Attributes:
        folder: named by all that the tokens depend on.
    """

    def __init__(self, spec: PretrainSpec, number: int, seed: int, encoder: Encoder, data: Path) -> None:
        self.spec, self.source, self.seed, self.encoder = spec, spec.sources[number], seed, encoder
        source = self.source.model_dump(mode="json", exclude={"weight"})
        rules = spec.model_dump(mode="json", include={"held_out", "deduplicate", "filters"})
        facts = [source, rules, seed, encoder.hash, token_files.SEGMENT]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = data / f"text-{number}-{digest}"

    def parts(self) -> list[dict[str, Any]]:
        """The parts of the source as they were when this was first asked. Until all are tokenized, a part whose files
        have changed begins again. Removes what killed attempts left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):
            leftover.unlink(missing_ok=True)
        path = self.folder / "parts.json"
        known = [Part.of(facts) for facts in json.loads(path.read_text())] if path.exists() else parts_of(self.source)
        if manifest.read(self.folder) is None:
            now = [part.now() for part in known]
            changed = [number for number, part in enumerate(now) if part != known[number]]
            for number in range(len(now)) if self.spec.deduplicate and changed else changed:
                token_files.discard(self.folder, number)
            known = now
            write_atomically(path, json.dumps([asdict(part) for part in known]), durable=True)
        return [asdict(part) for part in known]

    def write_hashes(self, parts: Mapping[int, Part], should_stop: Callable[[], bool]) -> None:
        """Write the hashes of the documents of some parts, by their numbers, unless that is done.

        Raises:
            HpcRlhfError: a part cannot be read.
            WorkCancelled: ``should_stop`` was true.
        """

        def kept(part: Part) -> Iterator[str | None]:
            for row in documents(self.source, part, self.seed, self.spec.filters):
                if should_stop():
                    raise WorkCancelled
                yield None if row.outcome else row.text

        for number, part in parts.items():
            if not (path := self._hashes(number)).exists():
                repeats.write_hashes(path, kept(part))

    def mark_repeats(self, parts: int) -> None:
        """Find the documents that are equal to an earlier one, in all parts, unless that is done."""
        if not all(self._marks(number).exists() for number in range(parts)):
            repeats.mark([self._hashes(n) for n in range(parts)], [self._marks(n) for n in range(parts)])

    def _hashes(self, number: int) -> Path:
        return self.folder / f"part-{number:05}-hashes"

    def _marks(self, number: int) -> Path:
        return self.folder / f"part-{number:05}-repeats"

    def _documents(self, number: int, part: Part) -> Iterator[Document]:
        """The rows of a part, those that repeat an earlier document left out if the spec says so."""
        rows = documents(self.source, part, self.seed, self.spec.filters)
        if not self.spec.deduplicate:
            return rows
        marks = repeats.read_marks(self._marks(number), self._hashes(number).stat().st_size // 8)
        return (
            row._replace(outcome=Outcome.REPEATED_TEXT) if again else row
            for row, again in zip(rows, marks.tolist(), strict=True)
        )

    def complete(self, number: int, part: Part, should_stop: Callable[[], bool]) -> list[dict[str, Any]]:
        """Verify the segments of a part, and write those that are missing.

        Returns:
            The facts of all of its segments.

        Raises:
            HpcRlhfError: the part cannot be read.
            WorkCancelled: ``should_stop`` was true; complete segments are kept.
        """
        segments, damage = token_files.intact(self.folder, number, should_stop)
        if damage is not None:
            print(f"hpc-rlhf: {damage} in {self.folder}: it is tokenized again", flush=True)
        if segments and segments[-1]["ends_part"]:
            return segments
        part.check()
        rows = segments[-1]["rows"] if segments else 0
        segment = Segment(SourceCounts(self.source.name))

        def finish(ends_part: bool) -> None:
            stem = token_files.stem_of(self.folder, number, len(segments))
            segments.append(segment.write(stem, rows, ends_part))

        for document, ids in self._encoded(islice(self._documents(number, part), rows, None), should_stop):
            rows += 1
            is_held_out = seeds.unit(self.seed, document.text, "held out") < self.spec.held_out
            if ids is not None:
                segment.add(ids, token_files.SPLITS[is_held_out])
            used = Outcome.HELD_OUT if is_held_out else Outcome.TRAINED
            segment.counts.add(document.outcome or used, document.where)
            if segment.size >= token_files.SEGMENT:
                finish(ends_part=False)
                segment = Segment(SourceCounts(self.source.name))
        finish(ends_part=True)
        return segments

    def _encoded(
        self, rows: Iterator[Document], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[Document, np.ndarray | None]]:
        """Rows with their token ids; None for those that are left out. The next rows are read meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(_batch, rows)
            while batch := coming.result():
                if should_stop():
                    raise WorkCancelled
                coming = reader.submit(_batch, rows)
                ids = iter(self.encoder([row.text for row in batch if row.outcome is None]))
                yield from ((row, next(ids) if row.outcome is None else None) for row in batch)

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


def prepare(
    spec: PretrainSpec, seed: int, tokenizer: Any, folder: Path, world: World, should_stop: Callable[[], bool] = bool
) -> list[tuple[TokenStream, TokenStream]]:
    """Tokenize a stage's sources, or verify what earlier attempts tokenized; the ranks share the parts. Collective.

    Args:
        should_stop: polled on every rank.

    Returns:
        The tokens of each source to train on, and those held out.

    Raises:
        WorkCancelled: ``should_stop`` was true; what is complete is kept.
        HpcRlhfError: a source cannot be read, or has no text.
    """
    encoder = Encoder(tokenizer)
    streams = []
    for number in range(len(spec.sources)):
        text = TextSource(spec, number, seed, encoder, folder)
        parts = [Part.of(facts) for facts in world.on_main(text.parts)]
        mine = {n: parts[n] for n in range(world.rank, len(parts), world.size)}
        if spec.deduplicate:
            world.on_each(lambda: text.write_hashes(mine, should_stop))  # noqa: B023
            world.on_main(lambda: text.mark_repeats(len(parts)))  # noqa: B023
        shares = world.on_each(lambda: [text.complete(n, part, should_stop) for n, part in mine.items()])  # noqa: B023
        ordered = [shares[n % world.size][n // world.size] for n in range(len(parts))]
        world.on_main(lambda: text.publish([segment for part in ordered for segment in part]))  # noqa: B023
        streams.append(text.streams())
    return streams
