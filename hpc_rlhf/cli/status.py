"""hpc-rlhf status: show how a run is getting on."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from hpc_rlhf.cli.options import json_option
from hpc_rlhf.cli.run_argument import find_run
from hpc_rlhf.cli.table import echo_table
from hpc_rlhf.observe.goodput import count_words, split_words, total
from hpc_rlhf.observe.status import StageStatus, read_status


@click.command
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Show how the stages of RUN, a run directory or job file, are getting on.

    Below them: what interrupted each, and where the time went. ETTR, the effective training time ratio, is productive
    time / time in the allocation, over all attempts of all stages.

    --json has the list `stages` and, over all of them, `goodput`. Each has under `goodput` the seconds waiting (for a
    stage that it needs, or for a person), queued, starting, productive (work that was kept), lost (work done again) and
    saving (training stood still); wall, their sum; ettr; and interruptions, each with its reason, time, node, step, and
    the seconds lost by it and spent on starting again. Those of the run are sums over stages, which may run side by side.
    """
    run_dir = find_run(run)
    stages = read_status(run_dir)
    whole = total({status.stage: status.goodput for status in stages})
    if as_json:
        status = {
            "run_dir": str(run_dir.path),
            "stages": [_as_json(stage) for stage in stages],
            "goodput": whole.to_dict(),
        }
        click.echo(json.dumps(status, indent=1, ensure_ascii=False))
        return
    echo_table(
        ("stage", "state", "job", "step", "last", "attempts", "why"), [_row(stage) for stage in stages]
    )
    broken = [(status.stage, count_words(status.goodput.interruptions)) for status in stages]
    _echo_lines([f"{stage}: {words}" for stage, words in broken if words], split_words(whole.spans))


def _as_json(status: StageStatus) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(status).items() if key != "goodput"}
    return {**facts, "goodput": status.goodput.to_dict()}


def _echo_lines(*groups: Sequence[str] | str) -> None:
    """Lines below an empty one, folded where a terminal is too narrow for them."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for group in filter(None, groups):
        click.echo()
        for line in [group] if isinstance(group, str) else group:
            click.echo(textwrap.fill(line, max(width, 20), subsequent_indent="  ") if width else line)


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
