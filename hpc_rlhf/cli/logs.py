"""hpc-rlhf logs: print a stage's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, json_option, run_argument
from hpc_rlhf.cli.console import print_json
from hpc_rlhf.observe import logs
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.printable import printable


@click.command(epilog=example("hpc-rlhf logs my-job.yaml ppo --follow", "hpc-rlhf logs my-job.yaml sft --attempt 2"))
@run_argument
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
def command(run: str, stage: str | None, follow: bool, rank: int | None, attempt: int | None, as_json: bool) -> None:
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
        click.echo(f"==> cause <==\n{printable(_cause(failure))}", err=True)


def _print_log(parts: Iterable[tuple[Path | None, str]]) -> None:
    for path, text in parts:
        if path is not None:
            click.echo(f"==> {path} <==", err=True)
        sys.stdout.write(printable(text))
        sys.stdout.flush()


def _cause(failure: logs.Trouble) -> str:
    """Such as: out of memory: RuntimeError: … (rank 3, node7, after step 120)."""
    place = [f"rank {failure.rank}", failure.node, "" if failure.step is None else f"after step {failure.step}"]
    what = ": ".join(filter(None, (failure.reason, failure.message)))
    return f"{what} ({', '.join(filter(None, place))})"
