"""hpc-rlhf report: write what a run did into one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.options import example
from hpc_rlhf.cli.out_option import writing
from hpc_rlhf.cli.run_argument import find_run


@click.command(epilog=example("hpc-rlhf report my-job.yaml"))
@click.argument("run")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; RUN/report.html when left out.",
)
def command(run: str, out: Path | None) -> None:
    """Write what RUN, a run directory or job file, did into one HTML file, and print where it is.

    It holds the outcome, where the time of each stage and attempt went, the curves, the evaluation, answers side by side,
    the spec and the versions. It needs no network and no other file, so it can be mailed. A run writes it anew after
    each stage.
    """
    from hpc_rlhf.observe.report import write_report

    run_dir = find_run(run)
    path = out or run_dir.report
    with writing(path):
        write_report(run_dir, path)
    click.echo(path)
