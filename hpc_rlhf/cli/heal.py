"""hpc-rlhf heal: restart the failed stages of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from hpc_rlhf.cli.arguments import example, find_runs, json_option
from hpc_rlhf.cli.console import print_table
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.heal import heal
from hpc_rlhf.run.events import Stopped
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger

# Exit code of a sentinel that stops: its job fails, and Slurm mails the address in notify.mail.
STOPPED_FOR_GOOD = 3


@click.command(epilog=example("hpc-rlhf heal my-job.yaml"))
@click.argument("run")
@json_option
@click.option("--sentinel", is_flag=True, hidden=True, help="Stop where another attempt would not help.")
@click.pass_context
def command(context: click.Context, run: str, as_json: bool, sentinel: bool) -> None:
    """Restart the failed stages of RUN, a run directory or job file, on Slurm.

    Stages resume from their last checkpoints; for a sweep, this covers all its runs. Each stage has a
    sentinel job that does the same automatically. Use this command when a stage has stopped and needs
    you, once you have fixed the cause.
    """
    runs = find_runs(run)
    if len(runs) > 1:
        _heal_sweep(runs, as_json)
        return
    run_dir = runs[0]
    stops = _stops(run_dir)
    outcomes = heal(run_dir, by_sentinel=sentinel)
    if as_json:
        click.echo(json.dumps([asdict(outcome) for outcome in outcomes], indent=1, ensure_ascii=False))
        return
    print_table(("stage", "job", ""), [(each.stage, each.job_id or "-", _result(each)) for each in outcomes])
    if all(each.did in ("done", "live") for each in outcomes):
        click.echo("nothing had to be restarted", err=True)
    if sentinel and _stops(run_dir) > stops:
        from hpc_rlhf.observe.report import leave_report

        leave_report(run_dir)
        context.exit(STOPPED_FOR_GOOD)


def _heal_sweep(runs: Sequence[RunDir], as_json: bool) -> None:
    """Heal every run of a sweep, starting with those whose stages others share."""
    outcomes = {each.path.name: heal(each) for each in runs}
    if as_json:
        facts = {name: [asdict(outcome) for outcome in done] for name, done in outcomes.items()}
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    rows = [(name, each.stage, each.job_id or "-", _result(each)) for name, done in outcomes.items() for each in done]
    print_table(("run", "stage", "job", ""), rows)


def _stops(run: RunDir) -> int:
    """How often a stage of the run was left to the user."""
    return sum(isinstance(event, Stopped) for event in Ledger(run.ledger).events())


def _result(outcome: Outcome) -> str:
    words = {
        "submitted": "submitted again",
        "requeued": "requeued",
        "live": "",
        "done": "already done",
        "stopped": "stopped",
        "waits": "waits",
    }[outcome.did]
    return ": ".join(filter(None, (words, outcome.detail)))
