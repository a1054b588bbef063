"""hpc-rlhf heal: mend a chain of Slurm jobs that broke."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from hpc_rlhf.cli.options import example, json_option
from hpc_rlhf.cli.run_argument import find_runs
from hpc_rlhf.cli.table import echo_table
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.heal import heal
from hpc_rlhf.run.events import Stopped
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger

# What a sentinel ends with then: its job fails, and Slurm mails whom notify.mail names.
LEFT_TO_A_PERSON = 3


@click.command(epilog=example("hpc-rlhf heal my-job.yaml"))
@click.argument("run")
@json_option
@click.option("--sentinel", is_flag=True, hidden=True, help="Stop where another attempt would not help.")
@click.pass_context
def command(context: click.Context, run: str, as_json: bool, sentinel: bool) -> None:
    """Let the chain of RUN, a run directory or job file, go on after a stage of it ended badly; of a sweep, all its chains.

    Stages go on from their last checkpoints. The jobs that sit beside each stage do this by themselves; this is for
    when they stopped and said why, and the cause is mended.
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
    echo_table(("stage", "job", ""), [(each.stage, each.job_id or "-", _said(each)) for each in outcomes])
    if all(each.did in ("done", "live") for each in outcomes):
        click.echo("nothing had to be tried again", err=True)
    if sentinel and _stops(run_dir) > stops:
        from hpc_rlhf.observe.report import leave_report

        leave_report(run_dir)
        context.exit(LEFT_TO_A_PERSON)


def _heal_sweep(runs: Sequence[RunDir], as_json: bool) -> None:
    """Heal each, those that train stages for others first."""
    outcomes = {each.path.name: heal(each) for each in runs}
    if as_json:
        facts = {name: [asdict(outcome) for outcome in done] for name, done in outcomes.items()}
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    rows = [
        (name, each.stage, each.job_id or "-", _said(each))
        for name, done in outcomes.items()
        for each in done
    ]
    echo_table(("run", "stage", "job", ""), rows)


def _stops(run: RunDir) -> int:
    """How often a stage of the run was left to the user."""
    return sum(isinstance(event, Stopped) for event in Ledger(run.ledger).events())


def _said(outcome: Outcome) -> str:
    words = {
        "submitted": "submitted anew",
        "requeued": "requeued",
        "live": "",
        "done": "done already",
        "stopped": "stopped",
        "waits": "waits",
    }[outcome.did]
    return ": ".join(filter(None, (words, outcome.detail)))
