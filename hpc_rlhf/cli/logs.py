"""hpc-rlhf logs: print the log of a stage."""

from __future__ import annotations

import sys
import time

import click

from hpc_rlhf.cli.options import example
from hpc_rlhf.cli.run_argument import find_run
from hpc_rlhf.observe.fates import Fates
from hpc_rlhf.observe.logs import POLL, LogReader, has_log_to_come, latest_stage


@click.command(epilog=example("hpc-rlhf logs my-job.yaml ppo --follow"))
@click.argument("run")
@click.argument("stage", required=False)
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Go on as the log grows, across requeues and retries, until the stage is done or left to a person.",
)
@click.option("--rank", default=0, show_default=True, type=click.IntRange(min=0), help="Whose log.")
def command(run: str, stage: str | None, follow: bool, rank: int) -> None:
    """Print the log of a STAGE of RUN, a run directory or job file; without STAGE, of the one that wrote last."""
    run_dir = find_run(run)
    fates = Fates(run_dir)
    if follow and stage is None and has_log_to_come(run_dir, fates):
        click.echo("no stage has a log yet; waiting for the first", err=True)
        while has_log_to_come(run_dir, fates):
            time.sleep(POLL)
    reader = LogReader(run_dir, stage or latest_stage(run_dir), rank)
    for path, text in reader.follow() if follow else reader.read():
        if path is not None:
            click.echo(f"==> {path} <==", err=True)
        sys.stdout.write(text)
        sys.stdout.flush()
