"""hpc-rlhf compare: rank runs by their results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.arguments import example, find_runs, json_option
from hpc_rlhf.cli.console import print_parts
from hpc_rlhf.observe.compare import EVALUATED, Compared, Comparison, OverSeeds, compare, compares_scores, over_seeds

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 100  # terminal columns that have room for more metrics
_MAX_METRICS, _MAX_METRICS_NARROW = 4, 2
_MAX_FIELDS = 6
_LONGEST_VALUE = 28


@click.command(epilog=example("hpc-rlhf compare my-sweep.yaml", "hpc-rlhf compare runs/one runs/other --by ppo.kl"))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--by", metavar="METRIC", help="Metric to rank by; --json lists them all.")
@json_option
def command(runs: tuple[str, ...], by: str | None, as_json: bool) -> None:
    """Rank runs by their results, and show the fields in which they differ.

    Each RUN is a run directory or a job file; a sweep stands for all its runs.

    By default, runs are ranked by the evaluated reward of their final model. If they have different reward
    models, whose scales do not compare, they are ranked by win rate. Without evaluations, they are ranked by
    the main training metric, such as ppo.reward: measured at the end of training, or averaged over the last
    tenth of the steps. Runs that differ only in their seed are also summarized together.

    --json prints `by`, the metric that they are ranked by; `judges`, the number of different reward models;
    `runs`, the best first; and `over_seeds`. A run has name, path, state, the `values` of the fields that
    differ, and all its `numbers`, each with value, low and high. The bounds of the interval are null if
    unknown.
    """
    folders = list({run.path: run for argument in runs for run in find_runs(argument)}.values())
    comparison = compare(folders, by)
    groups = over_seeds(comparison)
    if as_json:
        facts = {**asdict(comparison), "over_seeds": [asdict(group) for group in groups]}
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    print_parts(lambda width, live, ascii_only: _parts(comparison, groups, width))
    for note in _notes(comparison):
        click.echo(note, err=True)


def _parts(comparison: Comparison, groups: Sequence[OverSeeds], width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    yield _table(comparison, width)
    if groups:
        yield Text()
        yield _over_seeds_table(groups, str(comparison.by))


def _table(comparison: Comparison, width: int) -> RenderableType:
    from hpc_rlhf.observe.terminal.tables import grid, styled
    from hpc_rlhf.spec.sweep import short_names

    names = _metrics(comparison)[: _MAX_METRICS if width >= _WIDE else _MAX_METRICS_NARROW]
    paths = comparison.paths[:_MAX_FIELDS]
    short = short_names(paths)
    unfinished = any(run.state != "done" for run in comparison.runs)
    table = grid("", *names, *short.values(), *(["state"] if unfinished else []), "run")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for place, run in enumerate(comparison.runs, 1):
        cells = [_cell(run, name) for name in names]
        ranked = comparison.by in run.numbers
        states = [styled(run.state)] if unfinished else []
        values = [_shown(run.values.get(path)) for path in paths]
        table.add_row(str(place) if ranked else "-", *cells, *values, *states, run.name)
    return table


def _over_seeds_table(groups: Sequence[OverSeeds], by: str) -> RenderableType:
    from hpc_rlhf.observe.format import number
    from hpc_rlhf.observe.terminal.tables import grid
    from hpc_rlhf.spec.sweep import short_names

    paths = list(groups[0].values)[:_MAX_FIELDS]
    table = grid("", f"mean {by}", "std", "seeds", *short_names(paths).values())
    for place, group in enumerate(groups, 1):
        values = [_shown(group.values[path]) for path in paths]
        table.add_row(str(place), number(group.mean), number(group.std), str(group.runs), *values)
    return table


def _metrics(comparison: Comparison) -> list[str]:
    """The metrics of the table: the one ranked by first, then evaluation, then training."""
    known = dict.fromkeys(name for run in comparison.runs for name in run.numbers)
    evaluated = [name for name in EVALUATED if name in known]
    trained = [name for name in reversed(known) if name not in EVALUATED]
    first = [comparison.by] if comparison.by else []
    return [*first, *(name for name in (*evaluated, *trained) if name != comparison.by)]


def _cell(run: Compared, name: str) -> str:
    from hpc_rlhf.observe.evaluation import Interval, cell

    number = run.numbers.get(name)
    if number is None:
        return "-"
    if number.low is None:
        return cell(name, number.value)
    return cell(name, Interval(value=number.value, low=number.low, high=number.high))


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        value = " ".join(f"{key}={each}" for key, each in value.items() if each is not None)
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _notes(comparison: Comparison) -> Iterator[str]:
    if comparison.by is None:
        yield "no run has a metric to rank by yet"
    else:
        yield f"ranked by {comparison.by}"
    if compares_scores(comparison):
        yield f"the runs have {comparison.judges} different reward models, whose scales do not compare"
    hidden = len(comparison.paths) - _MAX_FIELDS
    if hidden > 0:
        yield f"{hidden} more fields differ: --json has them all"
