"""Reads samples from files and hub data sets, blends them by weight and splits them among the stages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import feedback
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.row_counts import Kind, Outcome, SourceCounts
from hpc_rlhf.spec import reward_checks
from hpc_rlhf.spec.data import DataSpec
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import Data, kind_of
from hpc_rlhf.train.data import arithmetic, demo, gym
from hpc_rlhf.train.data.files import Placed, read_rows
from hpc_rlhf.train.data.folders import files_of, unread_files
from hpc_rlhf.train.data.formats import read_row
from hpc_rlhf.train.data.messages import Dropped
from hpc_rlhf.train.data.rows import Sample, transcript
from hpc_rlhf.train.data.templates import END_OF_THINKING
from hpc_rlhf.train.runtime import seeds

# Characters of a source of documents that a tokenizer is trained on.
_TOKENIZER_TEXT = 2**25


def placed_rows(source: SourceSpec, seed: int) -> Iterator[Placed]:
    """The rows of a source, each after its place.

    Raises:
        HpcRlhfError: they cannot be read.
    """
    if source.feedback is not None:
        yield from votes(Path(source.feedback))
    elif source.generated is None and (files := local_files(source)) is not None:
        for file in files:
            yield from read_rows(file)
    else:
        rows = load(source) if source.generated is None else generate(source, seed)
        yield from ((f"{source.name}, row {number}", row) for number, row in enumerate(rows))


def votes(run: Path) -> Iterator[Placed]:
    """A run's votes as rows; a damaged line is an empty one.

    Raises:
        HpcRlhfError: there are none, or they may not be read.
    """
    folder = RunDir(run).feedback
    try:
        if not any(folder.iterdir()):
            raise FileNotFoundError
        for where, vote in feedback.read(folder):
            row = None if vote is None else vote.model_dump(include={"messages", "responses", "vote"})
            yield where, row or {}
    except FileNotFoundError as error:
        raise HpcRlhfError(
            "the run has no votes", where=str(run), hint="people vote on the page of hpc-rlhf serve RUN"
        ) from error
    except OSError as error:
        raise HpcRlhfError(f"cannot be read: {error.strerror}", where=str(error.filename)) from error


def generate(source: SourceSpec, seed: int) -> Iterable[dict[str, Any]]:
    """The rows of a source that is generated."""
    if source.demo is not None:
        return demo.dialogues(source.demo, seed)
    if source.arithmetic is not None:
        return arithmetic.problems(source.arithmetic, seed)
    return gym.problems(source.reasoning_gym or {}, seed)


def local_files(source: SourceSpec) -> list[Path] | None:
    """A local source's files in reading order; None if the source is not local.

    Raises:
        HpcRlhfError: there are none.
    """
    path = Path(source.path or "")
    if not path.is_absolute():  # a folder with a data set's name does not shadow it
        return None
    if not path.exists():
        raise HpcRlhfError("no such data file or folder", where=source.path)
    return files_of(path, source.subset, source.split) if path.is_dir() else [path]


def unread(source: SourceSpec) -> list[str]:
    """A sentence that names a folder's files that are not read: those without a split where others have one."""
    folder = Path(source.path or "")
    if local_files(source) is None or not folder.is_dir() or source.subset is not None:
        return []
    names = [str(file.relative_to(folder)) for file in unread_files(folder)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    which = f"{', '.join(names[:3])}{more} in {folder}"
    return [f"not read: {which}: other names show a split, and no name of these does"] if names else []


def load(source: SourceSpec) -> Iterable[dict[str, Any]]:
    """The rows of a data set of the hub."""
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # datasets raises a dozen types, most of them for user errors
        raise HpcRlhfError(
            f"the data could not be read ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})",
            where=source.path,
            hint="check the path or hub id, and that this node can reach it",
            exit_code=INPUT_WRONG if isinstance(error, (ValueError, FileNotFoundError)) else RUN_FAILED,
        ) from error


def read(source: SourceSpec, seed: int, counts: SourceCounts | None = None) -> Iterator[Sample]:
    """The samples of a source, each repeated according to the source's weight.

    Args:
        counts: where the rows that give no sample are counted.
    """
    name = source.name
    counts = SourceCounts(name) if counts is None else counts
    whole, part = divmod(source.weight, 1.0)
    for number, (where, row) in enumerate(placed_rows(source, seed)):
        try:
            sample = framed(read_row(row, source.row_format, where, source.columns, counts), source)
        except Dropped as dropped:
            counts.add(dropped.outcome, where)
            continue
        times = int(whole) + (seeds.unit(seed, name, number, "weight") < part)
        if not times:
            counts.add(Outcome.NOT_DRAWN, sample.where)
        for _ in range(times):
            yield sample


def framed(sample: Sample, source: SourceSpec) -> Sample:
    """A dialogue with the source's system prompt and examples."""
    turns = list(sample.turns)
    if not turns or not (source.system or source.few_shot):
        return sample
    if source.few_shot:
        first = next((place for place, (role, _) in enumerate(turns) if role == "human"), 0)
        turns[first] = (turns[first][0], f"{source.few_shot.rstrip()}\n\n{turns[first][1]}")
    if source.system and turns[0][0] != "system":
        turns.insert(0, ("system", source.system))
    return replace(sample, turns=tuple(turns), prompt=transcript(turns))


def conversation_of(sample: Sample, spec: JobSpec) -> str:
    """What a sample has in common with all others of its conversation, which go to the same stage, and are held out or
    not, together with it: its turns up to the first of the user; of plain text, the text."""
    if not sample.prompt or spec.data.version == 1:
        return sample.prompt or sample.chosen
    first = next((place for place, (role, _) in enumerate(sample.turns) if role == "human"), 0)
    return transcript(sample.turns[: first + 1])


def stage_of(conversation: str, spec: JobSpec, alone: bool = False) -> str:
    """The stage that trains on a conversation, drawn by its hash.

    Args:
        alone: no response is given, so only a stage that needs none is drawn, if there is one.
    """
    shares = spec.shares
    if alone:
        shares = {name: shares[name] for name in shares if kind_of(name).data is Data.PROMPTS} or shares
    place = seeds.unit(spec.seed, conversation, "stage") * sum(shares.values())
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return list(shares)[-1]


def is_held_out(conversation: str, spec: JobSpec) -> bool:
    """Whether a conversation is held out, drawn by its hash."""
    return seeds.unit(spec.seed, conversation, "held out") < spec.data.held_out


def asks_held_out(sample: Sample, spec: JobSpec) -> bool:
    """Whether a vote's conversation asks anything that is held out as a source asks it. On the page, people ask it
    without that source's system prompt and examples, with a system prompt of their own, or after other questions."""
    asked = [replace(sample, turns=(turn,), prompt=transcript([turn])) for turn in sample.turns if turn[0] == "human"]
    framings = (framed(question, source) for question in asked for source in spec.data.sources)
    return any(is_held_out(conversation_of(framing, spec), spec) for framing in framings)


class StageSample(NamedTuple):
    """A sample of a stage, whether it is held out for evaluation, and the counts of its source."""

    sample: Sample
    held_out: bool
    counts: SourceCounts


def unfit_for(sample: Sample, data: Data) -> Outcome | None:
    """Why a sample is not what a stage needs; None if it is."""
    if sample.labeled and data in (Data.PAIRS, Data.LABELED):
        return None if data is Data.LABELED else Outcome.ONE_ANSWER
    if sample.unanswered and data is not Data.PROMPTS:
        return sample.unanswered
    if data in (Data.PAIRS, Data.LABELED):
        if not sample.rejected:
            return sample.unpaired or (Outcome.ONE_ANSWER if data is Data.PAIRS else Outcome.NO_LABEL)
        if sample.rejected.strip() == sample.chosen.strip():
            return Outcome.SAME_ANSWERS
    return Outcome.NO_PROMPT if data is Data.PROMPTS and not sample.prompt else None


def uses_margins(spec: JobSpec, stage: str) -> bool:
    return getattr(spec.stage(stage), "margins", False)


def check_margin(sample: Sample, source: SourceSpec) -> None:
    """Raise HpcRlhfError if a pair has no margin."""
    if sample.margin is None:
        raise HpcRlhfError(
            f"the pair has no number in the column {source.columns.get('margin', 'margin')}",
            where=sample.where,
            hint="margins needs one for every pair; data.sources[].columns may name another column",
        )


def stage_samples(spec: JobSpec, stage: str, counts: Sequence[SourceCounts] = ()) -> Iterator[StageSample]:
    """A stage's samples.

    Held-out samples share no conversation with training samples, and no stage shares one with another, except prompts
    without a response, which go to PPO or GRPO. No vote on a held-out prompt is a training sample. Stages that train on
    pairs get only pairs, and KTO pairs and labeled responses; those that sample get each prompt once, and no plain
    text. No sample is held out twice, whatever its source's weight, so that held-out samples are independent.

    Args:
        counts: of each source; rows without a sample for the stage are counted here, the others by who uses them.

    Raises:
        HpcRlhfError: a source cannot be read, or a pair lacks the margin that the stage needs.
    """
    seen: set[bytes] = set()
    latest = ""
    data, with_margins = kind_of(stage).data, uses_margins(spec, stage)
    for source, counted in zip(spec.data.sources, counts or new_counts(spec), strict=True):
        for sample in read(source, spec.seed, counted):
            if with_margins and unfit_for(sample, data) is None:
                check_margin(sample, source)
            conversation = conversation_of(sample, spec)
            held_out = is_held_out(conversation, spec) or (bool(source.feedback) and asks_held_out(sample, spec))
            own = stage_of(conversation, spec, sample.unanswered is Outcome.PROMPT_ONLY) == stage
            unfit = unfit_for(sample, data) if own else Outcome.OTHER_STAGE
            if unfit is None and (held_out or data is Data.PROMPTS):
                answers = () if data is Data.PROMPTS else [getattr(sample, name) for name in data.answers]
                digest = hashlib.blake2b(repr((sample.prompt, *answers)).encode(), digest_size=16).digest()
                if digest in seen:
                    if sample.where == latest:
                        continue  # the same row again, by its weight
                    unfit = Outcome.REPEATED if data is Data.PROMPTS else Outcome.HELD_OUT_TWICE
                seen.add(digest)
            latest = sample.where
            if unfit is None:
                yield StageSample(sample, held_out, counted)
            else:
                counted.add(unfit, sample.where)


def mixed_samples(source: SourceSpec, seed: int, counts: SourceCounts) -> Iterator[StageSample]:
    """All samples of a source that is mixed into a stage; rows without a response are counted here."""
    for sample in read(source, seed, counts):
        unfit = unfit_for(sample, Data.ANSWERS)
        if unfit is None:
            yield StageSample(sample, False, counts)
        else:
            counts.add(unfit, sample.where)


def new_counts(spec: JobSpec) -> list[SourceCounts]:
    rewarded = reward_checks.all_columns(spec)
    return [SourceCounts(source.name, rewarded=rewarded) for source in spec.data.sources]


def check_lost(counts: SourceCounts, where: str, limits: DataSpec) -> None:
    """Raise HpcRlhfError if more rows of a source were lost than data.max_dropped allows."""
    if counts.lost > limits.max_dropped:
        raise HpcRlhfError(
            f"{counts.lost:.1%} of the rows of {counts.source} are left out, and data.max_dropped is "
            f"{limits.max_dropped:g}: {counts.describe(Kind.LOST, Kind.LOST_HERE)}",
            where=where,
            hint="fix these rows, or raise data.max_dropped",
        )


def nothing_for(stage: str, counts: Sequence[SourceCounts]) -> HpcRlhfError:
    """The error that a stage has no training data, with what became of the rows."""
    return HpcRlhfError(
        f"the data has no {kind_of(stage).data.value} for this stage: {'; '.join(one.summary() for one in counts)}",
        where=f"stage {stage}",
        hint="check data.sources, their formats, data.split, data.held_out and data.max_prompt_tokens",
    )


def texts(spec: JobSpec) -> Iterator[str]:
    """All text of the data, and the beginning of each source that a stage is pretrained on, to train a tokenizer on."""
    for source in spec.data.sources:
        for sample in read(source, spec.seed):
            yield sample.prompt + sample.chosen
            if sample.rejected:
                yield sample.rejected
    for stage in spec.stage_names:
        if kind_of(stage).data is Data.DOCUMENTS:
            for source in spec.stage(stage).sources:  # type: ignore[attr-defined]
                yield from _beginning(source, spec.seed)


def _beginning(source: SourceSpec, seed: int) -> Iterator[str]:
    """The texts of the first ``_TOKENIZER_TEXT`` characters of a source."""
    size = 0
    for sample in read(source, seed):
        size += len(sample.prompt + sample.chosen)
        yield sample.prompt + sample.chosen
        if size >= _TOKENIZER_TEXT:
            return


def thinks(spec: JobSpec) -> bool:
    """Whether most responses think: of the first hundred samples of each source."""
    samples = [sample for source in spec.data.sources for sample in islice(read(source, spec.seed), 100)]
    answers = [sample.chosen for sample in samples if not sample.unanswered]
    return 2 * sum(END_OF_THINKING in answer for answer in answers) > len(answers)
