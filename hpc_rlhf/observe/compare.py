"""Several runs side by side: what was asked of them that differs, how they came out, and which came out best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.evaluation import read_report
from hpc_rlhf.observe.listing import list_runs
from hpc_rlhf.observe.metrics import held_out_rows, read_latest, step_rows
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.cluster import SIZE
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import EVALUATION, StageKind, kind_of

# What an evaluation says of a model.
EVALUATED = ("reward", "reward_gain", "win_rate", "pair_accuracy", "kl", "perplexity", "answer_tokens")
_LATELY = 0.1  # share of a stage's steps that its training numbers are the mean of
_ASIDE = {"name", "run_dir", "slurm", "trackers", "notify", "sweep", "sweep_limit"}


@dataclass(frozen=True)
class Number:
    """A number, and its interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Compared:
    """One run.

    Attributes:
        name: its folder's.
        path: its directory.
        values: its values of the fields in which the runs differ, by path; null for a stage that it has not.
        state: done, or that of the stage that tells most, with that stage.
        numbers: how it came out. Of its last model as evaluated: reward, win_rate, …; of a stage's training, such as
            ppo.reward: what was measured at its end, or the mean over the last tenth of its steps.
        judge: the folder of its reward model; None where it trains none.
    """

    name: str
    path: str
    values: dict[str, Any]
    state: str
    numbers: dict[str, Number]
    judge: str | None


@dataclass(frozen=True)
class Comparison:
    """Runs, the best first; those that have no such number come last.

    Attributes:
        by: the number that they are ranked by; None where no run has any.
        judges: how many reward models there are; rewards of different ones do not compare.
    """

    by: str | None
    judges: int
    runs: tuple[Compared, ...]

    @property
    def paths(self) -> list[str]:
        """The fields in which the runs differ."""
        return list(dict.fromkeys(path for run in self.runs for path in run.values))


@dataclass(frozen=True)
class OverSeeds:
    """Runs that differ in their seed only.

    Attributes:
        values: what they have in common of the fields in which the runs differ.
        mean, std: of the number that the runs are ranked by; the standard deviation over runs is null for one.
    """

    values: dict[str, Any]
    runs: int
    mean: float
    std: float | None


def compare(runs: Sequence[RunDir], by: str | None = None) -> Comparison:
    """Compare runs.

    Args:
        by: the number to rank by. Left out it is the reward of the last model as evaluated, or where the runs have
            different reward models how often its answers win; and without evaluations what tells most of its training.

    Raises:
        HpcRlhfError: a spec cannot be read, or no run has such a number.
    """
    specs = {run: read_spec(run.job_yaml) for run in runs}
    facts = {run: _bearing(spec) for run, spec in specs.items()}
    differing = _differing(list(facts.values()))
    states = {line.path: " ".join(filter(None, (line.state, line.stage))) for line in list_runs(runs)}
    compared = [
        Compared(
            run.path.name,
            str(run.path),
            {path: _at(facts[run], path) for path in differing},
            states.get(str(run.path), "unknown"),
            dict(_numbers(run, spec)),
            str(run.stage(spec.judge).path.resolve()) if spec.judge else None,
        )
        for run, spec in specs.items()
    ]
    judges = len({run.judge for run in compared} - {None})
    known = list(dict.fromkeys(name for run in compared for name in run.numbers))
    if by is not None and by not in known:
        hint = (
            f"there are {', '.join(known)}" if known else "none has any number yet; hpc-rlhf status tells why"
        )
        raise HpcRlhfError(f"no run has the number {by!r}", where="--by", hint=hint)
    by = by or _default(known, judges, specs[runs[0]])
    return Comparison(by, judges, tuple(sorted(compared, key=lambda run: _rank(run, by))))


def over_seeds(comparison: Comparison) -> list[OverSeeds]:
    """The runs that differ in their seed only, taken together; the best first. Empty where there is nothing to take together."""
    if comparison.by is None or "seed" not in comparison.paths:
        return []
    by = comparison.by

    def rest(run: Compared) -> dict[str, Any]:
        return {path: value for path, value in run.values.items() if path != "seed"}

    ranked = [run for run in comparison.runs if by in run.numbers]
    groups = groupby(sorted(ranked, key=lambda run: repr(rest(run))), key=rest)
    found = []
    for values, group in groups:
        numbers = [run.numbers[by].value for run in group]
        spread = stdev(numbers) if len(numbers) > 1 else None
        found.append(OverSeeds(values, len(numbers), fmean(numbers), spread))
    together = [] if all(group.runs == 1 for group in found) else found
    return sorted(together, key=lambda group: _signed(by, group.mean))


def compares_scores(comparison: Comparison) -> bool:
    """Whether the runs are ranked by scores of reward models that are not the same."""
    if comparison.judges < 2 or comparison.by is None:
        return False
    kind, metric = _kind_and_metric(comparison.by)
    return metric in kind.scores


def _bearing(spec: JobSpec) -> dict[str, Any]:
    """What of a spec may bear on how its run comes out."""
    facts = spec.model_dump(mode="json", exclude=_ASIDE)
    for stage in facts["stages"].values():
        if stage is not None:
            stage["slurm"] = {key: stage["slurm"][key] for key in sorted(SIZE)}
    return facts


def _differing(facts: Sequence[dict[str, Any]]) -> list[str]:
    """The paths of what is not the same in all; of a mapping that is not in all, its own. Whether a run has been evaluated
    is told by its numbers."""
    flat = [dict(_flat(one)) for one in facts]
    paths = dict.fromkeys(path for one in flat for path in one)
    partly = tuple(f"{path}." for path in paths if any(other.startswith(f"{path}.") for other in paths))
    return [
        path
        for path in paths
        if path != f"stages.{EVALUATION.name}"
        and not path.startswith(partly)
        and any(_at(one, path) != _at(facts[0], path) for one in facts)
    ]


def _flat(facts: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        below = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            yield from _flat(value, below)
        else:
            yield below, value


def _at(facts: Any, path: str) -> Any:
    """What is at a path; None where there is nothing."""
    for key in path.split("."):
        facts = facts.get(key) if isinstance(facts, dict) else None
    return facts


def _numbers(run: RunDir, spec: JobSpec) -> Iterator[tuple[str, Number]]:
    if spec.evaluation and manifest.is_done(run.stage(EVALUATION.name)):
        model = read_report(run)["models"].get(spec.trained[-1], {})
        for name in EVALUATED:
            found = model.get(name)
            number = Number(**found) if isinstance(found, dict) else Number(found)
            if number.value is not None:
                yield name, number
    for stage in spec.trained:
        text = read_latest(run.stage(stage).metrics, stage, _LATELY)
        rows = step_rows(text, stage)
        lately = rows[-max(1, int(_LATELY * rows[-1]["total_steps"])) :] if rows else []
        numbers = {
            name: fmean(values)
            for name in kind_of(stage).progress
            if (values := [row[name] for row in lately if row.get(name) is not None])
        }
        for row in held_out_rows(text):
            if row["step"] == row["total_steps"]:  # measured on held-out data, when the stage was done
                numbers |= {
                    name: row[name] for name in ("perplexity", "accuracy") if row.get(name) is not None
                }
        yield from ((f"{stage}.{name}", Number(value)) for name, value in numbers.items())


def _default(known: Sequence[str], judges: int, spec: JobSpec) -> str | None:
    first = ("win_rate",) if judges > 1 else ()
    last = kind_of(spec.trained[-1])
    trained = (f"{last.name}.{metric}" for metric in last.ranking)
    wanted = (*first, *EVALUATION.ranking, *trained, *known)
    return next((name for name in wanted if name in known), None)


def _rank(run: Compared, by: str | None) -> tuple[bool, float]:
    number = run.numbers.get(by or "")
    return (True, 0.0) if number is None else (False, _signed(str(by), number.value))


def _signed(by: str, value: float) -> float:
    """Less for what is better."""
    kind, metric = _kind_and_metric(by)
    return value if metric in kind.lower_is_better else -value


def _kind_and_metric(by: str) -> tuple[StageKind, str]:
    """The stage and the metric of a number's name: `ppo.reward` is training's, `reward` the evaluation's."""
    stage, _, metric = by.rpartition(".")
    return kind_of(stage) if stage else EVALUATION, metric
