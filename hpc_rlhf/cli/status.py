"""hpc-rlhf status: show a run's progress."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace

import click

from hpc_rlhf.cli.arguments import example, json_option, run_argument
from hpc_rlhf.cli.console import print_json, print_parts, print_table
from hpc_rlhf.cli.list import show_runs
from hpc_rlhf.observe import listing
from hpc_rlhf.observe.find import find_runs, find_search
from hpc_rlhf.observe.goodput.spans import total
from hpc_rlhf.observe.status import read_status
from hpc_rlhf.run import acting, trials
from hpc_rlhf.run.format import number
from hpc_rlhf.run.layout import SweepDir
from hpc_rlhf.spec.member import short_names


@click.command(epilog=example("hpc-rlhf status my-job.yaml"))
@run_argument
@json_option
def command(run: str, as_json: bool) -> None:
    """Show the progress of the stages of RUN, a run directory or job file.

    The time left is estimated from the pace of the latest steps, without time in the queue. Below the table
    are what each stage waits for, what interrupted it, and where the time went. ETTR, the effective training
    time ratio, is productive time / time in the allocation, over all attempts of all stages. A sweep's runs
    are shown one per line, as by `list`, and the trials of a search with their values and results.

    --json prints the list `stages` and the run's total `goodput`. Each stage has `stage`, `state`, `why`,
    `job_id`, `attempts`, `step`, `total_steps`, `left` (seconds of work left), `numbers` (latest loss, reward
    and so on; the first of them also as `metric` and `value`) and `updated` (when the latest step was done).
    Unknown values are null. Its `goodput` has the seconds waiting (for another stage or the user), queued,
    starting, productive (kept work), lost (work done again) and saving (training paused); `wall`, their sum;
    `ettr`; and `interruptions`, each with reason, time, node, step, and the seconds lost and spent
    restarting. Its `held_out` has the metrics of its latest evaluation, its `step`, and with keep_best
    the `best_step` so far. Its `data` has for each source what became of the `rows`: `outcomes`, each with
    its number of rows and the first of them, and the fraction `lost`. The run's goodput sums over stages,
    which may run in parallel. For a sweep, --json prints what `list --json` does;
    for a search `trials`, each with number, name, values, metric, state (open, done or failed), value, why and,
    as `run`, what `list --json` prints; and `best`, the name of the best.
    """
    if (search := find_search(run)) is not None:
        _show_search(search, as_json)
        return
    runs = find_runs(run)
    if len(runs) > 1:
        order = [str(run.path) for run in runs]
        show_runs(sorted(listing.list_runs(runs), key=lambda line: order.index(line.path)), as_json)
        return
    stages = read_status(runs[0])
    if (origin := acting.made_elsewhere(runs[0])) is not None:
        words = f"this run was made in {origin}, where its jobs work; to adopt it here: hpc-rlhf relocate"
        click.echo(f"note: {words} {shlex.quote(str(runs[0].path))}", err=True)
    if as_json:
        facts = {
            "run_dir": str(runs[0].path),
            "stages": [
                {
                    **asdict(replace(stage, data=())),
                    "goodput": stage.goodput.to_dict(),
                    "data": [counts.to_dict() for counts in stage.data],
                }
                for stage in stages
            ],
            "goodput": total({stage.stage: stage.goodput for stage in stages}).to_dict(),
        }
        print_json(facts)
        return
    from hpc_rlhf.observe.terminal.board import Board

    print_parts(lambda width, live, ascii_only: Board(width, live, ascii_only).whole(stages))


def _show_search(folder: SweepDir, as_json: bool) -> None:
    """Print the trials of a search, one per line, and the best."""
    all_ = trials.read(folder.trials)
    lines = {line.path: line for line in listing.list_runs(folder.run(trial.name) for trial in all_)}
    runs = {trial.number: lines.get(str(folder.run(trial.name).path)) for trial in all_}
    if as_json:
        best = trials.best(all_)
        facts = [{**asdict(trial), "run": asdict(run) if (run := runs[trial.number]) else None} for trial in all_]
        print_json({"trials": facts, "best": best.name if best else None})
        return
    rows = []
    for trial in all_:
        run = runs[trial.number]
        at_work = f"{run.state} {run.stage or ''}".strip() if run else "not started"
        state = at_work if trial.state == "open" else ": ".join(filter(None, (trial.state, trial.why)))
        rows.append((str(trial.number + 1), number(trial.value), *map(_text, trial.values.values()), state))
    print_table(("", all_[0].metric, *short_names(list(all_[0].values)).values(), "state"), rows)
    click.echo(trials.describe(all_))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
