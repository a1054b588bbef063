"""Pretraining text as tokens, which all ranks write together, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_rlhf.spec.stages import PretrainSpec
from hpc_rlhf.train.data import common_lines, repeats, token_files
from hpc_rlhf.train.data.documents import Part
from hpc_rlhf.train.data.encoder import Encoder
from hpc_rlhf.train.data.text_parts import ShouldStop, TextPart, TextSource
from hpc_rlhf.train.data.token_files import TokenStream

if TYPE_CHECKING:
    from hpc_rlhf.train.runtime.world import World


def prepare(
    spec: PretrainSpec, seed: int, tokenizer: Any, folder: Path, world: World, should_stop: ShouldStop = bool
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
    parts = compared(spec, seed, tokenizer, folder, world, should_stop)
    own = world.on_each(lambda: [part.complete(should_stop) for part in parts[world.rank :: world.size]])
    segments: dict[TextSource, list[dict[str, Any]]] = {part.text: [] for part in parts}
    for number, part in enumerate(parts):
        segments[part.text] += own[number % world.size][number // world.size]

    def publish() -> None:
        for text, of_text in segments.items():
            text.publish(of_text)

    world.on_main(publish)
    return [text.streams() for text in segments]


def compared(
    spec: PretrainSpec, seed: int, tokenizer: Any, folder: Path, world: World, should_stop: ShouldStop = bool
) -> list[TextPart]:
    """The parts of a stage's sources, in order, after all has been compared that decides which documents are left out.
    Collective. Arguments and errors are those of ``prepare``."""
    encoder = Encoder(tokenizer)
    sources = [TextSource(spec, number, seed, encoder, folder) for number in range(len(spec.sources))]
    recorded = world.on_main(lambda: [[asdict(part) for part in parts] for parts in _current_parts(spec, sources)])
    parts = [
        TextPart(text, number, Part.of(facts))
        for text, own in zip(sources, recorded, strict=True)
        for number, facts in enumerate(own)
    ]
    if spec.deduplicate:
        _find_repeats(parts, world, should_stop)
    if spec.max_line_documents is not None:
        _find_common_lines(parts, spec.max_line_documents, world, should_stop)
    return parts


def _find_repeats(parts: Sequence[TextPart], world: World, should_stop: ShouldStop) -> None:
    """Mark the documents that are equal to an earlier one of any source, unless that is done. Collective."""

    def write_hashes() -> None:
        for part in parts[world.rank :: world.size]:
            part.write_hashes(should_stop)

    def mark() -> None:
        if not all(part.repeats.exists() for part in parts):
            repeats.mark([part.hashes for part in parts], [part.repeats for part in parts])

    world.on_each(write_hashes)
    world.on_main(mark)


def _find_common_lines(parts: Sequence[TextPart], most: int, world: World, should_stop: ShouldStop) -> None:
    """Find the lines that more than ``most`` documents have, unless that is done. Collective."""
    target = parts[0].text.common_lines

    def count() -> None:
        for part in parts[world.rank :: world.size]:
            part.write_lines(should_stop)

    def find() -> None:
        if not target.exists():
            common_lines.find([part.lines for part in parts], most, target)
        for part in parts:
            part.lines.unlink(missing_ok=True)

    if not world.on_main(target.exists):
        world.on_each(count)
    world.on_main(find)


def _current_parts(spec: PretrainSpec, sources: Sequence[TextSource]) -> list[list[Part]]:
    """The parts of the sources as they were when this was first asked. Until all are tokenized, a part whose files
    have changed begins again; all parts do if what is left out of one depends on the others."""
    known = [text.parts() for text in sources]
    complete = [text.is_complete for text in sources]
    if spec.compares_sources:
        complete = [all(complete)] * len(sources)
    current = [parts if done else [part.now() for part in parts] for parts, done in zip(known, complete, strict=True)]
    if current != known:
        sources[0].common_lines.unlink(missing_ok=True)
    for text, before, now in zip(sources, known, current, strict=True):
        for number, part in enumerate(now):
            if part != before[number] or (spec.compares_sources and current != known):
                token_files.discard(text.folder, number)
        text.record(now)
    return current
