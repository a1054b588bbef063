"""A stage's samples as tokens on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import Data, kind_of
from hpc_rlhf.train.data.arrow import CHUNK, RowFile, Rows
from hpc_rlhf.train.data.dialogues import encode
from hpc_rlhf.train.data.rows import Sample
from hpc_rlhf.train.data.sources import read as read_source
from hpc_rlhf.train.data.sources import stage_samples
from hpc_rlhf.train.runtime.stop_signals import Interrupted
from hpc_rlhf.train.runtime.world import World

PARTS = ("train", "held_out")


@dataclass(frozen=True)
class StageData:
    """A stage's token data sets.

    Rows have ``prompt``, a transcript, ``prompt_ids`` and ``chosen_ids``; those of pairs also ``rejected_ids``.
    Answer ids end with EOS unless they were cut. Nothing may be held out.
    """

    train: Rows
    held_out: Rows


def encoded(
    samples: Iterable[Sample], tokenizer: Any, spec: JobSpec, data: Data
) -> Iterator[dict[str, Any] | None]:
    """Samples as rows of token ids, a few at a time; None where PPO's prompt is too long to be cut.

    A long prompt is cut at the left; a long answer at the right, and then has no EOS.
    """
    longest, answers = spec.data.max_prompt_tokens, data.answers
    waiting = iter(samples)
    while chunk := list(islice(waiting, CHUNK)):
        for sample, (prompt_ids, *answer_ids) in zip(chunk, encode(chunk, tokenizer, *answers), strict=True):
            if data is Data.PROMPTS and len(prompt_ids) > longest:
                yield None
                continue
            row = {"prompt": sample.prompt, "prompt_ids": prompt_ids[-longest:]}
            for name, ids in zip(answers, answer_ids, strict=True):
                row[f"{name}_ids"] = ids[: spec.data.max_answer_tokens]
            yield row


def _fingerprint(tokenizer: Any, facts: dict[str, Any]) -> str:
    written = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template,
        "eos": tokenizer.eos_token,
    }
    return hashlib.sha256(json.dumps({**facts, **written}, sort_keys=True).encode()).hexdigest()[:16]


def _write(
    samples: Iterable[tuple[bool, Sample]],
    tokenizer: Any,
    spec: JobSpec,
    data: Data,
    folder: Path,
    told: Callable[[], bool] = bool,
) -> tuple[dict[str, int], int]:
    """Write token data sets as samples are read.

    Args:
        samples: each after whether it is held out.
        told: asked before each whether to drop it all.

    Returns:
        How many rows each data set has, and how many samples there were to train on.

    Raises:
        Interrupted: ``told`` said so.
    """
    held: deque[bool] = deque()  # of the samples that are being tokenised

    def read() -> Iterator[Sample]:
        for held_out, sample in samples:
            if told():
                raise Interrupted
            held.append(held_out)
            yield sample

    folder.mkdir(parents=True)
    files = [RowFile(folder / f"{part}.arrow", ("prompt", *data.answers)) for part in PARTS]
    found = 0
    for row in encoded(read(), tokenizer, spec, data):
        held_out = held.popleft()
        found += not held_out
        if row is not None:
            files[held_out].add(row)
    return dict(zip(PARTS, [file.close() for file in files], strict=True)), found


def _stored(target: Path, write: Callable[[], dict[str, Any]], world: World) -> StageData:
    """What is in a folder, written first if it is not there whole: by rank 0, while the others wait."""

    def make() -> None:
        if manifest.defect(target) is not None:
            shutil.rmtree(target, ignore_errors=True)
            manifest.write(target, write())

    world.on_main(make)
    return StageData(*[Rows(target / f"{part}.arrow") for part in PARTS])


def prepare(
    spec: JobSpec, stage: str, tokenizer: Any, folder: Path, world: World, told: Callable[[], bool] = bool
) -> StageData:
    """Tokenise a stage's data once, or find it from an earlier attempt. Collective.

    Args:
        told: asked on rank 0 from time to time whether to stop.

    Raises:
        Interrupted: ``told`` said so; nothing is kept.
        HpcRlhfError: the data cannot be read, or holds nothing for this stage.
    """
    facts = {
        "data": spec.data.model_dump(mode="json"), "stages": spec.trained, "seed": spec.seed, "stage": stage,
    }  # fmt: skip
    target = folder / _fingerprint(tokenizer, facts)

    def write() -> dict[str, Any]:
        data = kind_of(stage).data
        rows, found = _write(stage_samples(spec, stage), tokenizer, spec, data, target, told)
        if not found:
            raise HpcRlhfError(
                f"the data has no {data.value} for this stage",
                where=f"stage {stage}",
                hint="look at data.sources, their formats and data.split",
                exit_code=RUN_FAILED,
            )
        if not rows["train"]:
            raise HpcRlhfError(
                f"every prompt is longer than data.max_prompt_tokens, {spec.data.max_prompt_tokens}",
                where=f"stage {stage}",
                hint="raise data.max_prompt_tokens",
                exit_code=RUN_FAILED,
            )
        return {"stage": stage, "rows": rows}

    return _stored(target, write, world)


def prepare_mixture(
    source: SourceSpec, where: str, spec: JobSpec, tokenizer: Any, folder: Path, world: World,
    told: Callable[[], bool] = bool,
) -> Rows:  # fmt: skip
    """Tokenise all of a source that is mixed into a stage, as SFT would: a data set with rows as SFT's. Collective.

    Args:
        where: the field of the spec that names the source, for messages.
        told: asked on rank 0 from time to time whether to stop.

    Raises:
        Interrupted: ``told`` said so; nothing is kept.
        HpcRlhfError: the source cannot be read, or holds nothing.
    """
    facts = {
        "source": source.model_dump(mode="json"),
        "data": spec.data.model_dump(mode="json"),
        "seed": spec.seed,
    }
    target = folder / f"mixture-{_fingerprint(tokenizer, facts)}"

    def write() -> dict[str, Any]:
        samples = ((False, sample) for sample in read_source(source, spec.seed))
        rows, found = _write(samples, tokenizer, spec, Data.ANSWERS, target, told)
        if not found:
            raise HpcRlhfError("there is no text in it", where=where, exit_code=RUN_FAILED)
        return {"rows": rows}

    return _stored(target, write, world).train


def token_lengths(rows: Rows, *columns: str) -> np.ndarray:
    """Tokens of each row of a data set, summed over columns of token ids, without reading the tokens.

    Args:
        rows: a data set.

    Returns:
        (rows,), int64.
    """
    import pyarrow.compute as pc

    total = np.zeros(len(rows), dtype=np.int64)
    for column in columns:
        total += pc.list_value_length(rows.table[column]).to_numpy()
    return total
