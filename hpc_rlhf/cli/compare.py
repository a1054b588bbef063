"""hpc-rlhf compare: rank runs by their results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.arguments import example, json_option, write_out
from hpc_rlhf.cli.console import print_json, print_parts, print_table
from hpc_rlhf.observe import compare
from hpc_rlhf.observe.find import find_runs, find_search
from hpc_rlhf.observe.results import cell
from hpc_rlhf.run import trials
from hpc_rlhf.run.format import number
from hpc_rlhf.spec.member import short_names
from hpc_rlhf.spec.metric import Metric

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 100  # terminal columns that have room for more metrics
_MAX_METRICS, _MAX_METRICS_NARROW = 4, 2
_MAX_FIELDS = 6
_LONGEST_VALUE = 28


@click.command(epilog=example("hpc-rlhf compare my-sweep.yaml", "hpc-rlhf compare runs/one runs/other --by ppo.kl"))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--by", metavar="METRIC", help="Metric to rank by; --json lists them all.")
@click.option(
    "--html",
    "page",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write a page with the curves of all runs in the same charts; - for stdout.",
)
@json_option
def command(runs: tuple[str, ...], by: str | None, page: Path | None, as_json: bool) -> None:
    """Rank runs by their results, and show the fields in which they differ.

    Each RUN is a run directory or a job file; a sweep stands for all its runs.

    The trials of a search are ranked by its metric. By default, other runs are ranked by the evaluated accuracy
    of their final model, or else by its reward. If they have different reward models, whose scales do not
    compare, they are ranked by win rate. Without evaluations, they are ranked by the main training metric, such
    as ppo.reward: measured at the end of training, or averaged over the last tenth of the steps. Runs that differ
    only in their seed are also summarized together.
    Rounds that follow one another are shown in their order, without --by.

    --json prints `by`, the metric that they are ranked by; `judges`, the number of different reward models;
    `in_rounds`, whether the runs are rounds in their order; `runs`, the best first; and `over_seeds`. A run
    has name, path, state, the `values` of the fields that differ, and all its `numbers`, each with value, low
    and high. The bounds of the interval are null if unknown. A round also has `against`, what its win rate is
    against.
    """
    folders = list({run.path: run for argument in runs for run in find_runs(argument)}.values())
    searches = [search for argument in runs if (search := find_search(argument)) is not None]
    if by is None and len(searches) == len(runs) == 1:
        by = Metric.of(trials.read(searches[0].trials)[0].metric).compared
    comparison = compare.compare(folders, by)
    groups = compare.over_seeds(comparison)
    ranked = "no run has a metric to rank by yet" if comparison.by is None else f"ranked by {comparison.by}"
    if comparison.in_rounds:
        ranked = "rounds in their order; all are evaluated on the same prompts, each by its own reward model"
    elif compare.compares_scores(comparison):
        ranked += f"; the runs have {comparison.judges} different reward models, whose scales do not compare"
    if page is not None:
        _write_page(comparison, ranked, page)
        return
    if as_json:
        print_json({**asdict(comparison), "over_seeds": [asdict(group) for group in groups]})
        return
    print_parts(lambda width, live, ascii_only: [_table(comparison, width)])
    if groups:
        click.echo()
        paths = list(groups[0].values)[:_MAX_FIELDS]
        rows = [
            (str(place), number(group.mean), number(group.std), str(group.runs), *_shown(group.values, paths))
            for place, group in enumerate(groups, 1)
        ]
        print_table(("", f"mean {comparison.by}", "std", "seeds", *short_names(paths).values()), rows)
    click.echo(ranked, err=True)
    hidden = len(comparison.paths) - _MAX_FIELDS
    if hidden > 0:
        click.echo(f"{hidden} more fields differ: --json has them all", err=True)


def _write_page(comparison: compare.Comparison, ranked: str, page: Path) -> None:
    from hpc_rlhf.observe.report.comparison import make_comparison

    names, paths = _metrics(comparison), comparison.paths
    rows = [(run.name, *_shown(run.values, paths), *_cells(run, names), run.state) for run in comparison.runs]
    header = ("run", *short_names(paths).values(), *_titles(comparison, names), "state")
    text = make_comparison(comparison, ranked, [header, *rows])
    write_out(page, text)


def _table(comparison: compare.Comparison, width: int) -> RenderableType:
    """A row for each run."""
    from hpc_rlhf.observe.terminal.tables import grid, styled

    names = _metrics(comparison)[: _MAX_METRICS if width >= _WIDE else _MAX_METRICS_NARROW]
    paths = comparison.paths[:_MAX_FIELDS]
    unfinished = any(run.state != "done" for run in comparison.runs)
    table = grid(
        "", *_titles(comparison, names), *short_names(paths).values(), *(["state"] if unfinished else []), "run"
    )
    for column in table.columns[:-1]:
        column.no_wrap = True
    for place, run in enumerate(comparison.runs, 1):
        ranked = comparison.in_rounds or comparison.by in run.numbers
        states = [styled(run.state)] if unfinished else []
        table.add_row(str(place) if ranked else "-", *_cells(run, names), *_shown(run.values, paths), *states, run.name)
    return table


def _titles(comparison: compare.Comparison, names: Sequence[str]) -> list[str]:
    return [*names, *(["against"] if comparison.in_rounds else [])]


def _cells(run: compare.Compared, names: Sequence[str]) -> list[str]:
    """A run's metrics, and for a round what its win rate is against."""
    cells = [cell(name, run.numbers.get(name)) for name in names]
    return [*cells, *([] if run.against is None else [run.against])]


def _metrics(comparison: compare.Comparison) -> list[str]:
    """The metrics of the table: the one ranked by first, then evaluation, then training."""
    known = dict.fromkeys(name for run in comparison.runs for name in run.numbers)
    evaluated = [name for name in compare.EVALUATED if name in known]
    trained = [name for name in reversed(known) if name not in compare.EVALUATED]
    first = [comparison.by] if comparison.by else []
    return list(dict.fromkeys([*first, *evaluated, *trained]))


def _shown(values: Mapping[str, object], paths: Iterable[str]) -> Iterator[str]:
    """The values of fields, short enough for a table."""
    for path in paths:
        value = values.get(path)
        if isinstance(value, Mapping):
            value = " ".join(f"{key}={each}" for key, each in value.items() if each is not None)
        text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
        yield text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
