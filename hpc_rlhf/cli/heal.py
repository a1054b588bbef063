"""hpc-rlhf heal: restart the failed stages of a run."""

from __future__ import annotations

from dataclasses import asdict

import click

from hpc_rlhf.cli.arguments import example, json_option, run_argument
from hpc_rlhf.cli.console import print_json, print_rows
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.heal import heal
from hpc_rlhf.observe.find import find_runs
from hpc_rlhf.run.events import Stopped
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger

# Exit code of a sentinel that stops: its job fails, and Slurm mails the address in notify.mail.
STOPPED_FOR_GOOD = 3


@click.command(epilog=example("hpc-rlhf heal my-job.yaml"))
@run_argument
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
    alone = len(runs) == 1
    stops = _stops(runs[0])
    # In the sweep's order: a run whose stages others share comes before them.
    outcomes = {each.path.name: heal(each, by_sentinel=sentinel) for each in runs}
    if as_json:
        facts = {name: [asdict(each) for each in done] for name, done in outcomes.items()}
        print_json(facts[runs[0].path.name] if alone else facts)
        return
    rows = [(name, each.stage, each.job_id or "-", _healed(each)) for name, done in outcomes.items() for each in done]
    print_rows(("stage", "job", ""), rows, named=not alone)
    if alone and all(each.did in ("done", "live") for done in outcomes.values() for each in done):
        click.echo("nothing had to be restarted", err=True)
    if sentinel and _stops(runs[0]) > stops:
        from hpc_rlhf.observe.report.page import leave_report

        leave_report(runs[0])
        context.exit(STOPPED_FOR_GOOD)


def _stops(run: RunDir) -> int:
    """How often a stage of the run was left to the user."""
    return sum(isinstance(event, Stopped) for event in Ledger(run.ledger).events())


def _healed(outcome: Outcome) -> str:
    words = {
        "submitted": "submitted again",
        "requeued": "requeued",
        "live": "",
        "done": "already done",
        "stopped": "stopped",
        "waits": "waits",
    }[outcome.did]
    return ": ".join(filter(None, (words, outcome.detail)))
