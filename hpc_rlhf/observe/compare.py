"""Compare runs: the fields in which they differ, their metrics, and their ranking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.listing import list_runs
from hpc_rlhf.observe.metrics import held_out_rows, read_latest, read_text, step_rows
from hpc_rlhf.observe.results import AT_K, Interval, read_report
from hpc_rlhf.observe.rounds import opponent
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.cluster import SIZE
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec, rounds
from hpc_rlhf.spec.metric import Metric
from hpc_rlhf.spec.stages import EVALUATION, StageKind, kind_of

# The metrics of an evaluation that are compared.
EVALUATED = (
    "accuracy",
    "accuracy_gain",
    "reward",
    "reward_gain",
    "win_rate",
    "pair_accuracy",
    "kl",
    "perplexity",
    "answer_tokens",
)
_LATEST = 0.1  # share of a stage's steps over which its training metrics are averaged
# Fields of a spec that do not affect the results.
_IGNORED = {"name", "run_dir", "follows", "share", "slurm", "trackers", "notify", "sweep", "sweep_limit"}


@dataclass(frozen=True)
class Compared:
    """One run.

    Attributes:
        name: its folder's.
        values: its values of the fields in which the runs differ, by path; null in a stage that it does not have.
        state: done, or the state and name of its most important stage.
        numbers: its metrics. Those of its final model's evaluation: reward, win_rate, …; those of a stage's
            training, such as ppo.reward: measured at its end, or averaged over the last tenth of its steps; with
            keep_best, measured at the best step, or averaged over the tenth before it.
        judge: the folder of its reward model; None if it has none.
        against: what its win rate is against; None if the runs are not rounds of one another.
    """

    name: str
    path: str
    values: dict[str, object]
    state: str
    numbers: dict[str, Interval]
    judge: str | None
    against: str | None


@dataclass(frozen=True)
class Comparison:
    """Runs, the best first; runs without the metric come last. Rounds that follow one another are in their order.

    Attributes:
        by: the metric that they are ranked by; None if no run has any.
        judges: number of different reward models, whose rewards do not compare.
        in_rounds: whether they are rounds in their order, and not ranked.
    """

    by: str | None
    judges: int
    in_rounds: bool
    runs: tuple[Compared, ...]

    @property
    def paths(self) -> list[str]:
        """The fields in which the runs differ."""
        return list(dict.fromkeys(path for run in self.runs for path in run.values))


@dataclass(frozen=True)
class OverSeeds:
    """Runs that differ only in their seed.

    Attributes:
        values: their common values of the fields in which runs differ.
        mean, std: of the metric that runs are ranked by; the standard deviation is null for a single run.
    """

    values: dict[str, object]
    runs: int
    mean: float
    std: float | None


def compare(runs: Sequence[RunDir], by: str | None = None) -> Comparison:
    """Compare runs.

    Args:
        by: the metric to rank by. By default the evaluated accuracy of the final model; without rewards that judge it,
            its reward, or its win rate if the reward models differ; without evaluations, the main metric of training.

    Raises:
        HpcRlhfError: a spec cannot be read, or no run has the metric.
    """
    specs = {run: read_spec(run.job_yaml) for run in runs}
    followed = {Path(spec.follows).resolve() for spec in specs.values() if spec.follows}
    in_rounds = by is None and len(runs) == len(followed) + 1 and followed < {run.path.resolve() for run in runs}
    facts = {run: _relevant(spec) for run, spec in specs.items()}
    differing = _differing(list(facts.values()))
    states = {line.path: " ".join(filter(None, (line.state, line.stage))) for line in list_runs(runs)}
    compared = [
        Compared(
            run.path.name,
            str(run.path),
            {path: _at(facts[run], path) for path in differing},
            states.get(str(run.path), "unknown"),
            dict(_numbers(run, spec)),
            str(run.stage(spec.judge).model.resolve()) if spec.judge else spec.finished_reward,
            opponent(spec) if in_rounds else None,
        )
        for run, spec in specs.items()
    ]
    judges = len({run.judge for run in compared} - {None})
    known = list(dict.fromkeys(name for run in compared for name in run.numbers))
    if by is not None and by not in known:
        hint = f"available: {', '.join(known)}" if known else "no run has any metric yet: see hpc-rlhf status"
        raise HpcRlhfError(f"no run has the metric {by!r}", where="--by", hint=hint)
    by = by or _default(known, judges, specs[runs[0]])
    if in_rounds:
        order = {str(run.path): len(rounds(spec)) for run, spec in specs.items()}
        return Comparison(by, judges, True, tuple(sorted(compared, key=lambda run: order[run.path])))
    return Comparison(by, judges, False, tuple(sorted(compared, key=lambda run: _rank(run, by))))


def measure(run: RunDir, spec: JobSpec, metric: Metric) -> float | None:
    """A metric of a finished run; None if it has none."""
    number = dict(_numbers(run, spec)).get(metric.compared)
    return None if number is None else number["value"]


def over_seeds(comparison: Comparison) -> list[OverSeeds]:
    """Groups of runs that differ only in their seed, the best first; empty if no group has two runs."""
    if comparison.by is None or "seed" not in comparison.paths:
        return []
    by = comparison.by

    def rest(run: Compared) -> dict[str, object]:
        return {path: value for path, value in run.values.items() if path != "seed"}

    ranked = [run for run in comparison.runs if by in run.numbers]
    groups = []
    for values, members in groupby(sorted(ranked, key=lambda run: repr(rest(run))), key=rest):
        numbers = [run.numbers[by]["value"] for run in members]
        spread = stdev(numbers) if len(numbers) > 1 else None
        groups.append(OverSeeds(values, len(numbers), fmean(numbers), spread))
    if all(group.runs == 1 for group in groups):
        return []
    return sorted(groups, key=lambda group: _signed(by, group.mean))


def compares_scores(comparison: Comparison) -> bool:
    """Whether the runs are ranked by scores of different reward models."""
    if comparison.judges < 2 or comparison.by is None:
        return False
    kind, metric = _kind_and_metric(comparison.by)
    return metric in kind.scores


def _relevant(spec: JobSpec) -> dict[str, object]:
    """The fields of a spec that may affect the results of its run."""
    facts = spec.model_dump(mode="json", exclude=_IGNORED)
    for stage in facts["stages"].values():
        if stage is not None:
            stage["slurm"] = {key: stage["slurm"][key] for key in sorted(SIZE)}
    return facts


def _differing(facts: Sequence[dict[str, object]]) -> list[str]:
    """The paths of the fields that differ, as deep as all runs have them: a mapping that only some have is one field.
    Evaluation settings are left out, since the metrics show whether a run was evaluated."""
    paths = dict.fromkeys(path for one in facts for path in _leaves(one))
    fields = dict.fromkeys(_shared(path, facts) for path in paths if len({repr(_at(one, path)) for one in facts}) > 1)
    return [path for path in fields if path != f"stages.{EVALUATION.name}"]


def _leaves(value: object, path: str = "") -> Iterator[str]:
    """The paths of the values in a value that are neither mappings nor lists of mappings."""
    below = _below(value)
    if not below:
        yield path
    for key, inner in below.items():
        yield from _leaves(inner, f"{path}.{key}" if path else key)


def _shared(path: str, facts: Sequence[object]) -> str:
    """The field to show for a leaf: the outermost part of its path that has nothing below it in some run."""
    keys = path.split(".")
    parts = (".".join(keys[:count]) for count in range(1, len(keys)))
    return next((part for part in parts if any(not _below(_at(one, part)) for one in facts)), path)


def _below(value: object) -> dict[str, object]:
    """The entries of a mapping, or those of a list of mappings by index; empty for any other value."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return {str(number): each for number, each in enumerate(value)}
    return value if isinstance(value, dict) else {}


def _at(facts: object, path: str) -> object:
    """The value at a path; None if there is none."""
    for key in path.split("."):
        facts = _below(facts).get(key)
    return facts


def _numbers(run: RunDir, spec: JobSpec) -> Iterator[tuple[str, Interval]]:
    if spec.evaluation and manifest.is_done(run.stage(EVALUATION.name)):
        model = read_report(run)["models"].get(spec.trained[-1], {})
        for name in (*EVALUATED, *(name for name in model if name.startswith(AT_K))):
            metric: float | Interval | None = model.get(name)
            if metric is not None:
                yield name, metric if isinstance(metric, dict) else Interval(value=metric, low=None, high=None)
    for stage in spec.trained:
        text = read_latest(run.stage(stage).metrics, stage, _LATEST)
        ended = [row for row in held_out_rows(text) if row.step == row.total_steps]  # measured when the stage was done
        handed_on = ended[-1].values.get("best_step", ended[-1].step) if ended else None
        if ended and handed_on != ended[-1].step:  # the metrics are those of the weights that were best
            text = read_text(run.stage(stage).metrics)
        rows = [row for row in step_rows(text, stage) if handed_on is None or row.step <= handed_on]
        latest = rows[-max(1, int(_LATEST * rows[-1].total_steps)) :] if rows else []
        numbers = {
            name: fmean(values)
            for name in kind_of(stage).progress
            if (values := [value for row in latest if (value := row.values.get(name)) is not None])
        }
        for row in held_out_rows(text):
            if row.step == handed_on:
                for name in ("perplexity", "accuracy"):
                    if (value := row.values.get(name)) is not None:
                        numbers[name] = value
        for name, value in numbers.items():
            yield f"{stage}.{name}", Interval(value=value, low=None, high=None)


def _default(known: Sequence[str], judges: int, spec: JobSpec) -> str | None:
    first = ("accuracy", "win_rate") if judges > 1 else ()
    last = kind_of(spec.trained[-1])
    trained = (f"{last.name}.{metric}" for metric in last.ranking)
    candidates = (*first, *EVALUATION.ranking, *trained, *known)
    return next((name for name in candidates if name in known), None)


def _rank(run: Compared, by: str | None) -> tuple[bool, float]:
    number = run.numbers.get(by or "")
    return (True, 0.0) if number is None else (False, _signed(str(by), number["value"]))


def _signed(by: str, value: float) -> float:
    """The key to sort by: smaller is better."""
    kind, metric = _kind_and_metric(by)
    return value if metric in kind.lower_is_better else -value


def _kind_and_metric(by: str) -> tuple[StageKind, str]:
    """The stage and the metric of a name: `ppo.reward` is from training, `reward` from the evaluation."""
    stage, _, metric = by.rpartition(".")
    return kind_of(stage) if stage else EVALUATION, metric
