"""hpc-rlhf status: show how a run is getting on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from hpc_rlhf.cli.options import example, json_option
from hpc_rlhf.cli.run_argument import find_runs
from hpc_rlhf.observe.goodput.totals import total
from hpc_rlhf.observe.status import StageStatus, read_status
from hpc_rlhf.run.layout import RunDir


@click.command(epilog=example("hpc-rlhf status my-job.yaml"))
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Show how the stages of RUN, a run directory or job file, are getting on.

    The time left is that of the remaining steps at the pace of the last ones; nobody knows how long a job will queue.
    Below the table: what each stage waits for, what interrupted it, and where the time went. ETTR, the effective
    training time ratio, is productive time / time in the allocation, over all attempts of all stages.

    --json has the list `stages` and, over all of them, `goodput`. A stage has its name `stage`, its `state` in words and
    `why`; `job_id`, `attempts`; `step`, `total_steps`, and `left`, the seconds that the remaining steps take; `numbers`,
    the latest loss, reward and so on, and the first of them as `metric` and `value`; `updated`, when its last step was
    done. What is not known is null. Each has under `goodput` the seconds waiting (for a stage that it needs, or for a
    person), queued, starting, productive (work that was kept), lost (work done again) and saving (training stood still);
    wall, their sum; ettr; and interruptions, each with its reason, time, node, step, and the seconds lost by it and spent
    on starting again. Those of the run are sums over stages, which may run side by side.

    The runs of a sweep are shown each in a line, and as --json what `list` prints of them.
    """
    runs = find_runs(run)
    if len(runs) > 1:
        _show_sweep(runs, as_json)
        return
    run_dir = runs[0]
    stages = read_status(run_dir)
    if as_json:
        status = {
            "run_dir": str(run_dir.path),
            "stages": [_as_json(stage) for stage in stages],
            "goodput": total({status.stage: status.goodput for status in stages}).to_dict(),
        }
        click.echo(json.dumps(status, indent=1, ensure_ascii=False))
        return
    from hpc_rlhf.cli.console import print_parts
    from hpc_rlhf.observe.terminal.board import Board

    print_parts(lambda width, live, plain: Board(width, live, plain).whole(stages))


def _show_sweep(runs: Sequence[RunDir], as_json: bool) -> None:
    """The runs of a sweep, each in a line, in their order."""
    from hpc_rlhf.cli.list import show_runs
    from hpc_rlhf.observe.listing import list_runs

    order = [str(run.path) for run in runs]
    show_runs(sorted(list_runs(runs), key=lambda line: order.index(line.path)), as_json)


def _as_json(status: StageStatus) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(status).items() if key != "goodput"}
    return {**facts, "goodput": status.goodput.to_dict()}
