"""Verbs that show what runs left: compare, report, logs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.arguments import example, find_run, find_runs, json_option, writing
from hpc_rlhf.cli.console import print_json, print_parts, print_table
from hpc_rlhf.observe import compare, logs
from hpc_rlhf.observe.format import number
from hpc_rlhf.observe.results import cell
from hpc_rlhf.spec.sweep import short_names

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
def compare_command(runs: tuple[str, ...], by: str | None, as_json: bool) -> None:
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
    comparison = compare.compare(folders, by)
    groups = compare.over_seeds(comparison)
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
    ranked = "no run has a metric to rank by yet" if comparison.by is None else f"ranked by {comparison.by}"
    click.echo(ranked, err=True)
    if compare.compares_scores(comparison):
        judges = f"{comparison.judges} different reward models"
        click.echo(f"the runs have {judges}, whose scales do not compare", err=True)
    hidden = len(comparison.paths) - _MAX_FIELDS
    if hidden > 0:
        click.echo(f"{hidden} more fields differ: --json has them all", err=True)


def _table(comparison: compare.Comparison, width: int) -> RenderableType:
    """A row for each run."""
    from hpc_rlhf.observe.terminal.tables import grid, styled

    names = _metrics(comparison)[: _MAX_METRICS if width >= _WIDE else _MAX_METRICS_NARROW]
    paths = comparison.paths[:_MAX_FIELDS]
    unfinished = any(run.state != "done" for run in comparison.runs)
    table = grid("", *names, *short_names(paths).values(), *(["state"] if unfinished else []), "run")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for place, run in enumerate(comparison.runs, 1):
        cells = [cell(name, run.numbers.get(name)) for name in names]
        ranked = comparison.by in run.numbers
        states = [styled(run.state)] if unfinished else []
        table.add_row(str(place) if ranked else "-", *cells, *_shown(run.values, paths), *states, run.name)
    return table


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


@click.command(epilog=example("hpc-rlhf report my-job.yaml"))
@click.argument("run")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.", show_default="RUN/report.html"
)
def report_command(run: str, out: Path | None) -> None:
    """Write the report of RUN, a run directory or job file, as one HTML file and print its path.

    The report has the outcome, where the time of each stage and attempt went, training curves, the
    evaluation, responses side by side, the spec and the versions. It is self-contained and needs no network,
    so you can mail it. A run updates its report after each stage.
    """
    from hpc_rlhf.observe.report.page import write_report

    run_dir = find_run(run)
    path = out or run_dir.report
    with writing(path):
        write_report(run_dir, path)
    click.echo(path)


@click.command(epilog=example("hpc-rlhf logs my-job.yaml ppo --follow", "hpc-rlhf logs my-job.yaml sft --attempt 2"))
@click.argument("run")
@click.argument("stage", required=False)
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Follow the log across requeues and retries, until the stage is done or stopped for good.",
)
@click.option(
    "--rank", type=click.IntRange(min=0), help="Rank whose log to print.", show_default="the rank that failed, else 0"
)
@click.option(
    "--attempt",
    type=click.IntRange(min=1),
    help="Print one attempt, counted from 1 as in the report.",
    show_default="all of the latest job",
)
@json_option
def logs_command(
    run: str, stage: str | None, follow: bool, rank: int | None, attempt: int | None, as_json: bool
) -> None:
    """Print the log of a STAGE of RUN, a run directory or job file; by default of the latest stage.

    After the log of a failed stage, the cause is printed on stderr. --json prints the location of the log
    instead: stage, rank, files, and as trouble the reason, message, rank, node and step of the failure, or
    null.
    """
    run_dir = find_run(run)
    if attempt is not None:
        if follow or as_json:
            raise click.UsageError("--attempt cannot be used with --follow or --json.")
        _print_log(logs.read_attempt(run_dir, stage or logs.latest_stage(run_dir), rank or 0, attempt))
        return
    watch = logs.StageWatch(run_dir)
    if follow and stage is None and logs.has_log_to_come(run_dir, watch):
        click.echo("no stage has a log yet; waiting for the first", err=True)
        while logs.has_log_to_come(run_dir, watch):
            time.sleep(logs.POLL)
    stage = stage or logs.latest_stage(run_dir)
    failure = logs.trouble(run_dir, stage)
    if rank is None:
        rank = failure.rank if failure is not None and not follow else 0
    reader = logs.LogReader(run_dir, stage, rank)
    if as_json:
        files = [str(path) for path in reader.files()]
        print_json({"stage": stage, "rank": rank, "files": files, "trouble": failure and asdict(failure)})
        return
    _print_log(reader.follow() if follow else reader.read())
    failure = logs.trouble(run_dir, stage)
    if failure is not None:
        click.echo(f"==> cause <==\n{_cause(failure)}", err=True)


def _print_log(parts: Iterable[tuple[Path | None, str]]) -> None:
    for path, text in parts:
        if path is not None:
            click.echo(f"==> {path} <==", err=True)
        sys.stdout.write(text)
        sys.stdout.flush()


def _cause(failure: logs.Trouble) -> str:
    """Such as: out of memory: RuntimeError: … (rank 3, node7, after step 120)."""
    place = [f"rank {failure.rank}", failure.node, "" if failure.step is None else f"after step {failure.step}"]
    what = ": ".join(filter(None, (failure.reason, failure.message)))
    return f"{what} ({', '.join(filter(None, place))})"
