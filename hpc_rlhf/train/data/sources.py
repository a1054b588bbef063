"""Reads samples from files and hub data sets, blends them by weight and splits them among the stages."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import Data, kind_of
from hpc_rlhf.train.data import demo
from hpc_rlhf.train.data.rows import Dropped, Sample, read_row
from hpc_rlhf.train.data.templates import END_OF_THINKING
from hpc_rlhf.train.runtime import seeds

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def _builder(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst", ".bz2", ".xz")]
    return BUILDERS.get(suffixes[-1].lower()) if suffixes else None


def _reader_options(builder: str | None, file: str) -> dict[str, Any]:
    """Further arguments for datasets. In a csv file every cell is text, such as None, 007 or 2026-01-31."""
    if builder != "csv":
        return {}
    import pandas  # type: ignore[import-untyped]
    from datasets import Features, Value

    columns = pandas.read_csv(file, nrows=0).columns
    return {"features": Features({name: Value("string") for name in columns}), "keep_default_na": False}


def load(source: SourceSpec) -> Iterable[dict[str, Any]]:
    """The rows of a source that has a path."""
    import datasets

    assert source.path is not None
    path = Path(source.path)
    try:
        files: list[str] = []
        if path.is_dir():
            files = sorted(str(file) for file in path.iterdir() if _builder(file))
        elif path.exists():
            if _builder(path) is None:
                raise HpcRlhfError(
                    f"the name {path.name} does not show what kind of file it is",
                    where=source.path,
                    hint="use .json, .jsonl, .csv or .parquet, compressed or not",
                )
            files = [str(path)]
        elif path.is_absolute():
            raise HpcRlhfError("no such data file or folder", where=source.path)
        if files:
            builder = _builder(Path(files[0]))
            options = _reader_options(builder, files[0])
            return datasets.load_dataset(builder, data_files=files, split="train", **options)
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except HpcRlhfError:
        raise
    except Exception as error:  # datasets raises a dozen types, most of them for user errors
        _explain(path)
        raise HpcRlhfError(
            f"the data could not be read ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})",
            where=source.path,
            hint="check the path or hub id, and that this node can reach it",
            exit_code=RUN_FAILED,
        ) from error


def _explain(path: Path) -> None:
    """Raise HpcRlhfError with the first error in a local file that datasets cannot read, if it can be found."""
    if not path.is_file():
        return
    if path.suffix == ".zst" and find_spec("zstandard") is None:
        raise HpcRlhfError(
            "reading .zst needs the package zstandard", where=str(path), hint="pip install zstandard, or decompress it"
        )
    if path.stat().st_size == 0:
        raise HpcRlhfError("the data file is empty", where=str(path), hint="write one row per line")
    if ".jsonl" not in path.suffixes:
        return
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                is_row = not line.strip() or isinstance(json.loads(line), dict)
            except ValueError:
                is_row = False
            if not is_row:
                raise HpcRlhfError(
                    f"the line is not a JSON object: {line.strip()[:60]!r}",
                    where=f"{path}:{number}",
                    hint='each line of a .jsonl file is one row, such as {"prompt": "…", "chosen": "…"}',
                )


def name_of(source: SourceSpec) -> str:
    return source.path or "demo"


def read(source: SourceSpec, seed: int, counts: SourceCounts | None = None) -> Iterator[Sample]:
    """The samples of a source, each repeated according to the source's weight.

    Args:
        counts: where the rows that give no sample are counted.
    """
    where = name_of(source)
    counts = SourceCounts(where) if counts is None else counts
    rows: Iterable[dict[str, Any]] = demo.dialogues(source.demo, seed) if source.demo else load(source)
    kind = source.format or "prompt-chosen-rejected"
    whole, part = divmod(source.weight, 1.0)
    for number, row in enumerate(rows):
        try:
            sample = read_row(row, kind, f"{where}, row {number}")
        except Dropped as dropped:
            counts.add(dropped.outcome, f"{where}, row {number}")
            continue
        times = int(whole) + (seeds.unit(seed, where, number, "weight") < part)
        if not times:
            counts.add(Outcome.NOT_DRAWN, sample.where)
        for _ in range(times):
            yield sample


def stage_of(prompt: str, spec: JobSpec) -> str:
    """The stage that trains on a prompt, drawn by the hash of the prompt, so that all its rows go to one stage."""
    shares = spec.shares
    place = seeds.unit(spec.seed, prompt, "stage") * sum(shares.values())
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return list(shares)[-1]


def is_held_out(prompt: str, spec: JobSpec) -> bool:
    return seeds.unit(spec.seed, prompt, "held out") < spec.data.held_out


class StageSample(NamedTuple):
    """A sample of a stage, whether it is held out for evaluation, and the counts of its source."""

    sample: Sample
    held_out: bool
    counts: SourceCounts


def _unfit(sample: Sample, data: Data) -> Outcome | None:
    """Why a sample is not what a stage needs; None if it is."""
    if data is Data.PAIRS:
        if not sample.rejected:
            return sample.unpaired or Outcome.ONE_ANSWER
        if sample.rejected.strip() == sample.chosen.strip():
            return Outcome.SAME_ANSWERS
    return Outcome.NO_PROMPT if data is Data.PROMPTS and not sample.prompt else None


def stage_samples(spec: JobSpec, stage: str, counts: Sequence[SourceCounts] = ()) -> Iterator[StageSample]:
    """A stage's samples.

    Held-out samples share no prompt with training samples, and no stage shares a prompt with another. Stages
    that train on pairs get only pairs; PPO gets each prompt once, and no plain text.

    Args:
        counts: of each source; rows without a sample for the stage are counted here, the others by who uses them.
    """
    seen: set[bytes] = set()
    latest = ""
    data = kind_of(stage).data
    for source, counted in zip(spec.data.sources, counts or new_counts(spec), strict=True):
        for sample in read(source, spec.seed, counted):
            key = sample.prompt or sample.chosen
            unfit = Outcome.OTHER_STAGE if stage_of(key, spec) != stage else _unfit(sample, data)
            if unfit is None and data is Data.PROMPTS:
                digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
                if digest in seen:
                    if sample.where == latest:
                        continue  # the same row again, by its weight
                    unfit = Outcome.REPEATED
                seen.add(digest)
            latest = sample.where
            if unfit is None:
                yield StageSample(sample, is_held_out(key, spec), counted)
            else:
                counted.add(unfit, sample.where)


def new_counts(spec: JobSpec) -> list[SourceCounts]:
    return [SourceCounts(name_of(source)) for source in spec.data.sources]


def texts(spec: JobSpec) -> Iterator[str]:
    """All text of the sources, to train a tokenizer on."""
    for source in spec.data.sources:
        for sample in read(source, spec.seed):
            yield sample.prompt + sample.chosen
            if sample.rejected:
                yield sample.rejected


def thinks(spec: JobSpec) -> bool:
    """Whether most responses think: of the first hundred of each source."""
    samples = [sample for source in spec.data.sources for sample in islice(read(source, spec.seed), 100)]
    return 2 * sum(END_OF_THINKING in sample.chosen for sample in samples) > len(samples)
