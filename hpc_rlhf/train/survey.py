"""Reads the data of specs as their stages would, before anything trains: ``python -m hpc_rlhf.train.survey``.

Standard input is JSON: ``specs`` and ``whole``, whether all rows are read or the first of each file. The last line of
output is JSON, for each spec the fields of `Survey`. Without ``whole``, nothing imports torch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from hpc_rlhf.spec import hub, reward_checks
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import Data, kind_of
from hpc_rlhf.train.data import sources
from hpc_rlhf.train.data.files import Placed, read_rows
from hpc_rlhf.train.data.formats import read_row
from hpc_rlhf.train.data.messages import Dropped
from hpc_rlhf.train.data.rows import Sample
from hpc_rlhf.train.runtime.alone import Alone

# Rows to read per file, per file if there are many, and per source when looking for a row that a stage can use.
SAMPLE, FEW, SEARCHED = 100, 10, 20_000


@dataclass
class Survey:
    """What the data of a spec is like.

    Attributes:
        problems: each with the ``path`` of the field in the spec, ``what`` is wrong and a ``hint``.
        data: what becomes of the rows, by the field or the stage: for each source as ``SourceCounts.to_dict``.
        notes: sentences on what is left out or changed, or could not be found out.
    """

    problems: list[dict[str, str]] = field(default_factory=list)
    data: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def refuse(self, path: str, error: HpcRlhfError) -> None:
        what = f"{error.where}: {error.message}" if error.where else error.message
        self.problems.append({"path": path, "what": what, "hint": error.hint or ""})


@dataclass
class Sampled:
    """What became of a source's first rows, the kinds of stages that can use some of them, and how many rows were read
    to know."""

    counts: SourceCounts
    fits: frozenset[Data]
    searched: int = 0


@cache
def sampled(
    source: SourceSpec, needs: frozenset[Data], margins: bool = False, rewarded: frozenset[str] = frozenset()
) -> Sampled | HpcRlhfError:
    """The first rows of each of a source's files, or why they cannot be used. Demo and remote data fit all needs.

    Args:
        margins: every pair needs one.
        rewarded: columns that rewards read.
    """
    counts = SourceCounts(source.name, rewarded=rewarded)
    try:
        files = sources.local_files(source)
        is_remote = files is None and source.generated is None and source.feedback is None
        if source.demo is not None or is_remote:
            if margins and source.demo is not None:
                sources.check_margin(Sample((), "", "", where=counts.source), source)
            return Sampled(counts, needs)
        first: Iterator[Placed]
        if files is None:
            first = islice(sources.placed_rows(source, 0), SAMPLE)
        else:
            size = SAMPLE if len(files) <= SAMPLE // FEW else FEW
            first = (row for file in files for row in islice(read_rows(file), size))
        fits: set[Data] = set()
        for row in first:
            fits |= _uses(source, row, needs, counts, margins)
        searched = SourceCounts("")
        if needs - fits:
            for row in islice(sources.placed_rows(source, 0), SEARCHED):
                fits |= _uses(source, row, needs, searched, margins)
                if not needs - fits:
                    break
    except HpcRlhfError as error:
        return error
    return Sampled(counts, frozenset(fits), searched.read)


def _uses(source: SourceSpec, row: Placed, needs: frozenset[Data], counts: SourceCounts, margins: bool) -> set[Data]:
    """The kinds of stages that can use a row. It is counted under what the most demanding of them makes of it."""
    where, cells = row
    try:
        sample = read_row(cells, source.row_format, where, source.columns, counts)
    except Dropped as dropped:
        counts.add(dropped.outcome, where)
        return set()
    unfit = {data: sources.unfit_for(sample, data) for data in needs}
    if margins and unfit[Data.PAIRS] is None:
        sources.check_margin(sample, source)
    gives_prompt = sample.unanswered is Outcome.PROMPT_ONLY and Data.PROMPTS in needs and not unfit[Data.PROMPTS]
    gives_label = sample.labeled and Data.LABELED in needs
    by_demand = (unfit.get(data) for data in (Data.PAIRS, Data.LABELED, Data.ANSWERS))
    outcome = None if gives_prompt or gives_label else next(filter(None, by_demand), None)
    counts.add(outcome or Outcome.TRAINED, where)
    return {data for data, why in unfit.items() if why is None}


def look(spec: JobSpec) -> Survey:
    """The survey of a spec's data from the first rows of each local file."""
    survey = Survey()
    stages = {stage: kind_of(stage).data for stage in spec.shares}
    margins = any(sources.uses_margins(spec, stage) for stage in stages)
    needs, fits, searched = frozenset(stages.values()), set[Data](), [0]
    rewarded, known = reward_checks.all_columns(spec), dict[str, SourceCounts]()
    for path, source in spec.sources.items():
        of_stages = path.startswith("data.")
        one = sampled(source, needs, margins, rewarded) if of_stages else sampled(source, frozenset({Data.ANSWERS}))
        if isinstance(one, HpcRlhfError):
            survey.refuse(path, one)
            continue
        if of_stages:
            fits |= one.fits
            searched.append(one.searched)
        known[path] = one.counts
        survey.notes += [f"{path}: {text}" for text in sources.unread(source)]
    if not survey.problems:
        for data in needs - fits:
            names = " and ".join(stage for stage, own in stages.items() if own is data)
            cut, total = max(searched) == SEARCHED, sum(searched)
            some = f"the first {SEARCHED:,} of each source" if cut else f"all {total:,}"
            what = f"none of the rows gives {data.value}, which {names} needs; {some} were read"
            hint = f"fix the rows or their format, add a source with {data.value}, or remove {names}"
            survey.problems.append({"path": "data.sources", "what": what, "hint": hint})
    missing = [] if survey.problems else list(_missing_columns(spec))
    survey.problems += missing
    for path, counts in known.items():
        shown = replace(counts, ignored={}) if missing else counts  # the problem names the columns that there are
        survey.data[path] = [shown.to_dict()]
        survey.notes += [f"{path}: in the first {shown.read} rows, {text}" for text in shown.warnings()]
    return survey


def _missing_columns(spec: JobSpec) -> Iterator[dict[str, str]]:
    """Rewards that need a column which no row has, as far as the data are on this machine."""
    needed, there = reward_checks.columns(spec), set[str]()
    names = reward_checks.all_columns(spec)
    for source in spec.data.sources:
        if source.path is not None and sources.local_files(source) is None:
            return
        for sample in islice(sources.read(source, 0), SEARCHED):
            if names <= there:
                return
            there |= sample.further.keys()
    for path, columns in needed.items():
        for column in sorted(columns - there):
            others = ", ".join(sorted(there)) or "none"
            what = f"needs the column {column}, and no row has it; further columns are {others}"
            close = get_close_matches(column, there, 1)
            hint = f"did you mean {close[0]}?" if close else "rename one of the data's by columns: of a source"
            yield {"path": path, "what": what, "hint": hint}


def tokenizer_of(spec: JobSpec, folder: Path, data: Data = Data.ANSWERS) -> Any:
    """The tokenizer as stages that take such data have it.

    Raises:
        HpcRlhfError: it cannot be loaded; with RUN_FAILED if it is not on this machine.
    """
    from hpc_rlhf.train.data.dialogues import configure_tokenizer
    from hpc_rlhf.train.models.tokenizers import load_tokenizer

    world: Any = Alone()
    tokenizer = load_tokenizer(spec.models.actor, sources.texts(spec), folder, world)
    if data is Data.DOCUMENTS:  # they end with the tokenizer's own EOS
        return tokenizer
    return configure_tokenizer(tokenizer, spec.data.template, lambda: sources.thinks(spec))


def read_all(spec: JobSpec) -> Survey:
    """The survey of a spec's data from all rows: what becomes of each in each stage."""
    survey = look(spec)
    if survey.problems:
        return survey
    survey.data = {}
    survey.notes = [f"{path}: {text}" for path, one in spec.sources.items() for text in sources.unread(one)]
    tokenizer = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer = tokenizer_of(spec, Path(folder))
        except HpcRlhfError as error:
            if error.exit_code != RUN_FAILED:
                survey.refuse("models.actor", error)
                return survey
            survey.notes.append("the tokenizer is not on this machine, so nothing is said of what is cut or too long")
        for path, stage, counts, samples, data in parts(spec):
            try:
                _count(stage, samples, tokenizer, spec, data)
                if not any(Outcome.TRAINED in one.outcomes for one in counts):
                    raise sources.nothing_for(path.split(".")[1], counts)
                for one in counts:
                    sources.check_lost(one, path, spec.data)
            except HpcRlhfError as error:
                survey.refuse("data.sources" if stage else path, error)
            survey.data[path] = [one.to_dict() for one in counts]
            survey.notes += [f"{path}: {text}" for one in counts for text in one.warnings()]
    return survey


# A path in the spec, the stage whose samples these are (None for a source that is mixed into one), counts by source.
Part = tuple[str, str | None, list[SourceCounts], Iterator[sources.StageSample], Data]


def parts(spec: JobSpec) -> Iterator[Part]:
    """What is tokenized: the samples of each stage, and of each source that is mixed into one."""
    for stage in spec.shares:
        counts = sources.new_counts(spec)
        yield f"stages.{stage}", stage, counts, sources.stage_samples(spec, stage, counts), kind_of(stage).data
    for path, source in spec.sources.items():
        if not path.startswith("data.") and kind_of(path.split(".")[1]).data is not Data.DOCUMENTS:
            one = SourceCounts(source.name)
            yield path, None, [one], sources.mixed_samples(source, spec.seed, one), Data.ANSWERS


def _count(
    stage: str | None, samples: Iterator[sources.StageSample], tokenizer: Any, spec: JobSpec, data: Data
) -> None:
    if tokenizer is None:
        for sample, held_out, counts in samples:
            counts.add(Outcome.HELD_OUT if held_out else Outcome.TRAINED, sample.where)
        return
    from hpc_rlhf.train.data.tokenized import encoded, ends_turns

    for _ in encoded(samples, tokenizer, spec, data, ends_turns(spec, stage)):
        pass


def main() -> None:
    asked = json.load(sys.stdin)
    specs = [JobSpec.model_validate(spec) for spec in asked["specs"]]
    if not any(hub.missing(item) for item in hub.items(*specs)):
        os.environ.setdefault(hub.OFFLINE, "1")
    surveys = [read_all(spec) if asked["whole"] else look(spec) for spec in specs]
    print(json.dumps([asdict(survey) for survey in surveys]))


if __name__ == "__main__":
    main()
