"""hpc-rlhf report: write a run's HTML report."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, run_argument, write_out
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.report.page import make_page
from hpc_rlhf.run import acting


@click.command(epilog=example("hpc-rlhf report my-job.yaml"))
@run_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="File to write; - for stdout.",
    show_default="RUN/report.html",
)
def command(run: str, out: Path | None) -> None:
    """Write the report of RUN, a run directory or job file, as one HTML file and print its path.

    The report has the outcome, where the time of each stage and attempt went, training curves, the
    evaluation, responses side by side, the spec and the versions. It is self-contained and needs no network,
    so you can mail it. A run updates its report after each stage.
    """
    run_dir = find_run(run)
    if out is None:
        acting.check_owner(run_dir)
    write_out(out or run_dir.report, make_page(run_dir))
