"""hpc-rlhf status: show how a run is getting on."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from hpc_rlhf.cli.options import json_option
from hpc_rlhf.cli.run_argument import find_run
from hpc_rlhf.cli.table import echo_table
from hpc_rlhf.observe.status import StageStatus, read_status


@click.command
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Show how the stages of RUN, a run directory or job file, are getting on."""
    run_dir = find_run(run)
    stages = read_status(run_dir)
    if as_json:
        status = {"run_dir": str(run_dir.path), "stages": [asdict(stage) for stage in stages]}
        click.echo(json.dumps(status, indent=1, ensure_ascii=False))
        return
    echo_table(
        ("stage", "state", "job", "step", "last", "attempts", "why"), [_row(stage) for stage in stages]
    )


def _row(stage: StageStatus) -> tuple[str, ...]:
    step = "-" if stage.step is None else f"{stage.step}/{stage.total_steps}"
    last = "-" if stage.metric is None else f"{stage.metric} {stage.value:.4g}"
    return (
        stage.stage,
        stage.state,
        stage.job_id or "-",
        step,
        last,
        str(stage.attempts or "-"),
        stage.why.partition("\n")[0],
    )
