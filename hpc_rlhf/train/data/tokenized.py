"""A stage's samples, tokenized and stored on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.row_counts import Outcome, SourceCounts, read_counts
from hpc_rlhf.spec.data import DataSpec
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import GRPO, KTO, Data, kind_of
from hpc_rlhf.train.data.arrow import CHUNK, RowFile, Rows
from hpc_rlhf.train.data.dialogues import Tokens, encode, pieces, shorten
from hpc_rlhf.train.data.further import to_json
from hpc_rlhf.train.data.rows import Sample
from hpc_rlhf.train.data.sources import (
    StageSample,
    check_lost,
    mixed_samples,
    new_counts,
    nothing_for,
    stage_samples,
    unread,
    uses_margins,
)
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled
from hpc_rlhf.train.runtime.world import World

PARTS = ("train", "held_out")


@dataclass(frozen=True)
class StageData:
    """A stage's token data sets.

    Rows have ``prompt``, a transcript, ``prompt_ids`` and ``chosen_ids``; those of pairs also ``rejected_ids``, and
    ``margin`` if the stage uses it. Labeled responses are ``chosen_ids``, each with its ``label``, 1 for a good one and
    0 for a bad one. Response ids end with EOS unless they were truncated. If a stage of the run has
    ``rewards``, rows have ``columns``, the further columns of the data (see ``columns_of``), and the name of their
    ``source``. ``held_out`` may be empty.
    """

    train: Rows
    held_out: Rows


def encoded(
    samples: Iterable[StageSample], tokenizer: Any, spec: JobSpec, data: Data, ends: bool = False
) -> Iterator[tuple[bool, dict[str, Any], SourceCounts]]:
    """Samples as rows of token ids, each with whether it is held out, and the counts of its source. Every sample is
    counted.

    PPO and GRPO leave samples with a long prompt out; other stages leave out its oldest turns. A long response is
    truncated on the right, and then has no EOS. Plain text becomes a row for each of its pieces.

    Args:
        ends: as ``Renderer`` takes it; see ``ends_turns``.
    """
    remaining = iter(samples)
    while chunk := list(islice(remaining, CHUNK)):
        tokens = encode([sample for sample, _, _ in chunk], tokenizer, *data.answers, ends=ends)
        for (sample, held_out, counts), one in zip(chunk, tokens, strict=True):
            if one is None:
                counts.add(Outcome.TEMPLATE, sample.where)
            elif data is Data.PROMPTS and len(one.prompt) > spec.data.max_prompt_tokens:
                counts.add(Outcome.TOO_LONG, sample.where)
            else:
                counts.add(Outcome.HELD_OUT if held_out else Outcome.TRAINED, sample.where)
                if one.drops_thinking:
                    counts.add(Outcome.NO_THINKING, sample.where)
                for row in _rows(sample, one, tokenizer, spec.data, data, counts, ends):
                    yield held_out, {**row, "source": counts.source}, counts


def _rows(
    sample: Sample, tokens: Tokens, tokenizer: Any, limits: DataSpec, data: Data, counts: SourceCounts, ends: bool
) -> Iterator[dict[str, Any]]:
    """The rows of a sample, as long as the limits allow; what is changed for that is counted."""
    longest, longest_answer = limits.max_prompt_tokens, limits.max_answer_tokens
    if not sample.prompt:
        several = list(pieces(tokens, longest + longest_answer))
        if len(several) > 1:
            counts.add(Outcome.SPLIT, sample.where)
        yield from ({"prompt": "", "prompt_ids": before, "chosen_ids": piece} for before, piece in several)
        return
    prompt_ids = tokens.prompt
    if len(prompt_ids) > longest:
        counts.add(Outcome.CUT_LEFT, sample.where)
        prompt_ids = shorten(sample, tokens, tokenizer, longest, ends)
    if any(len(ids) > longest_answer for ids in tokens.responses):
        counts.add(Outcome.CUT_RIGHT, sample.where)
    responses = zip(data.answers, tokens.responses, strict=True)
    answers = {f"{name}_ids": ids[:longest_answer] for name, ids in responses}
    margin = {} if sample.margin is None else {"margin": sample.margin}
    further = {"columns": sample.further} if sample.further else {}
    row = {"prompt": sample.prompt, "prompt_ids": prompt_ids, **margin, **further}
    if data is not Data.LABELED:
        yield {**row, **answers}
        return
    for name, label in (("chosen", 1.0), ("rejected", 0.0)):
        if ids := answers[f"{name}_ids"]:
            yield {**row, "chosen_ids": ids, "label": label}


def _fingerprint(tokenizer: Any, facts: dict[str, Any]) -> str:
    settings = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template,
        "eos": tokenizer.eos_token,
    }
    return hashlib.sha256(json.dumps({**facts, **settings}, sort_keys=True).encode()).hexdigest()[:16]


def _write(
    samples: Iterable[StageSample],
    tokenizer: Any,
    spec: JobSpec,
    data: Data,
    folder: Path,
    should_stop: Callable[[], bool] = bool,
    numbers: tuple[str, ...] = (),
    ends: bool = False,
    further: bool = False,
) -> dict[str, Any]:
    """Write token data sets as samples are read.

    Args:
        numbers: columns that rows have besides token ids.
        further: rows have the further columns of the data, too.

    Returns:
        The number of ``rows`` of each data set, and the names of their further ``columns``.

    Raises:
        WorkCancelled: ``should_stop`` was true.
    """

    def until_stopped() -> Iterator[StageSample]:
        for each in samples:
            if should_stop():
                raise WorkCancelled
            yield each

    folder.mkdir(parents=True)
    texts, names = ("columns", "source") if further else (), set[str]()
    answers = ("chosen",) if data is Data.LABELED else data.answers
    files = [RowFile(folder / f"{part}.arrow", ("prompt", *answers), numbers, texts) for part in PARTS]
    for held_out, row, _ in encoded(until_stopped(), tokenizer, spec, data, ends):
        if further:
            row["columns"] = to_json(row.get("columns", {}))
            names |= json.loads(row["columns"]).keys()
        files[held_out].add(row)
    rows = dict(zip(PARTS, [file.close() for file in files], strict=True))
    return {"rows": rows, **({"columns": sorted(names)} if further else {})}


def _stored(target: Path, write: Callable[[], dict[str, Any]], world: World, where: str, limits: DataSpec) -> StageData:
    """The data sets in a folder. If they are incomplete, rank 0 writes them first while the others wait.

    Args:
        where: the stage or field that the data is for, for messages.

    Raises:
        HpcRlhfError: more rows were lost than data.max_dropped allows.
    """

    def make() -> None:
        if manifest.defect(target) is not None:
            shutil.rmtree(target, ignore_errors=True)
            manifest.write(target, write())
        for counts in read_counts(manifest.read(target) or {}):
            print(f"hpc-rlhf: data of {where}: {counts.summary()}", flush=True)
            for sentence in counts.warnings():
                print(f"hpc-rlhf: warning: {where}: {sentence}", file=sys.stderr, flush=True)
            check_lost(counts, where, limits)

    world.on_main(make)
    further = (manifest.read(target) or {}).get("columns", ())
    return StageData(*[Rows(target / f"{part}.arrow", further) for part in PARTS])


def _facts(spec: JobSpec) -> dict[str, Any]:
    """What tokens depend on in any stage. What earlier versions did is left out, so that their tokens are found."""
    as_before = {field for field, value in spec.data.before.items() if getattr(spec.data, field) == value}
    facts = spec.data.model_dump(mode="json", exclude={"max_dropped", *as_before})
    for stage in {GRPO.name, KTO.name}.difference(spec.trained):  # earlier versions had no such stages
        del facts["split"][stage]
    return {"data": facts, "seed": spec.seed}


def ends_turns(spec: JobSpec, stage: str | None) -> bool:
    """Whether EOS follows earlier responses in the prompts of a stage, or of text that is mixed into one (None): where
    prompts are learned, too. Otherwise the model would learn to go on with the human's turn after its own."""
    learned = stage is None or not getattr(spec.stage(stage), "answer_only", True)
    return learned and spec.data.version > 1


def prepare(
    spec: JobSpec, stage: str, tokenizer: Any, folder: Path, world: World, should_stop: Callable[[], bool] = bool
) -> StageData:
    """Tokenize a stage's data, or open what an earlier attempt tokenized. Collective.

    Args:
        should_stop: polled on rank 0.

    Raises:
        WorkCancelled: ``should_stop`` was true; nothing is kept.
        HpcRlhfError: the data cannot be read, has nothing for this stage, or too many rows are lost.
    """
    numbers = ("margin",) if uses_margins(spec, stage) else kind_of(stage).data.numbers
    ends = ends_turns(spec, stage)
    further = spec.uses_columns
    more = {name: value for name, value in (("numbers", numbers), ("ends", ends), ("further", further)) if value}
    facts = {**_facts(spec), "stages": spec.trained, "stage": stage, **more}
    target = folder / _fingerprint(tokenizer, facts)

    def write() -> dict[str, Any]:
        data = kind_of(stage).data
        counts = new_counts(spec)
        for text in (text for source in spec.data.sources for text in unread(source)):
            print(f"hpc-rlhf: warning: stage {stage}: {text}", file=sys.stderr, flush=True)
        samples = stage_samples(spec, stage, counts)
        written = _write(samples, tokenizer, spec, data, target, should_stop, numbers, ends, further)
        if written["rows"]["train"]:
            return {"stage": stage, **written, "sources": [source.to_dict() for source in counts]}
        raise nothing_for(stage, counts)

    return _stored(target, write, world, f"stage {stage}", spec.data)


def prepare_mixture(
    source: SourceSpec, where: str, spec: JobSpec, tokenizer: Any, folder: Path, world: World,
    should_stop: Callable[[], bool] = bool,
) -> Rows:  # fmt: skip
    """Tokenize all of a source that is mixed into a stage, as for SFT; otherwise like ``prepare``. Collective.

    Args:
        where: the field of the spec that names the source, for messages.
    """
    facts = {**_facts(spec), "source": source.model_dump(mode="json")}
    target = folder / f"mixture-{_fingerprint(tokenizer, facts)}"

    def write() -> dict[str, Any]:
        counts = SourceCounts(source.name)
        ends, samples = ends_turns(spec, None), mixed_samples(source, spec.seed, counts)
        written = _write(samples, tokenizer, spec, Data.ANSWERS, target, should_stop, ends=ends)
        if not written["rows"]["train"]:
            raise HpcRlhfError(f"there is no text in it: {counts.summary()}", where=where)
        return {**written, "sources": [counts.to_dict()]}

    return _stored(target, write, world, where, spec.data).train


def learned_tokens(row: Mapping[str, Any], answer_only: bool) -> int:
    """How many of a row's last tokens SFT learns: those of the response, or all. The first of a sequence cannot be
    predicted."""
    predicted = len(row["prompt_ids"]) + len(row["chosen_ids"]) - 1
    return min(len(row["chosen_ids"]), predicted) if answer_only else predicted


def token_lengths(rows: Rows, *columns: str) -> np.ndarray:
    """Tokens of each row, summed over columns of token ids, without reading the tokens.

    Returns:
        (rows,), int64.
    """
    import pyarrow.compute as pc

    total = np.zeros(len(rows), dtype=np.int64)
    for column in columns:
        total += pc.list_value_length(rows.table[column]).to_numpy()
    return total
