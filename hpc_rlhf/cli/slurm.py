"""Verbs for a run's jobs on Slurm: submit, cancel, heal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, find_runs, json_option, set_option
from hpc_rlhf.cli.console import print_json, print_table
from hpc_rlhf.cli.plan_tables import print_choice, print_plan
from hpc_rlhf.launch.auto import load
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.heal import heal
from hpc_rlhf.launch.jobs import cancel
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.prepare import refuse_changes
from hpc_rlhf.launch.submit import preview, submit
from hpc_rlhf.launch.sweep import shared, submit_sweep
from hpc_rlhf.run.events import Stopped
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep

# Exit code of a sentinel that stops: its job fails, and Slurm mails the address in notify.mail.
STOPPED_FOR_GOOD = 3


@click.command(epilog=example("hpc-rlhf submit my-job.yaml --dry-run"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@click.option("--dry-run", is_flag=True, help="Show what would be submitted. Needs no Slurm and writes nothing.")
def submit_command(file: Path, sets: tuple[str, ...], dry_run: bool) -> None:
    """Submit the stages of FILE to Slurm.

    Submitting the same file again attaches to the run: stages that are done, queued or running are left
    alone. The runs of a sweep are submitted together; a stage that several of them share is trained once.
    """
    spec = load(file, sets, print_choice)
    if dry_run:
        if isinstance(spec, Sweep):
            _preview_sweep(spec)
        else:
            _preview(spec, file.parent)
        return
    if isinstance(spec, Sweep):
        outcomes, noun, verbs = submit_sweep(spec, file.parent), "runs", ("status", "compare", "cancel")
    else:
        outcomes, noun, verbs = {"": submit(spec, file.parent)}, "run", ("status", "logs -f", "cancel")
    rows = [
        (name, each.stage, each.job_id or "-", _submitted(each)) for name, done in outcomes.items() for each in done
    ]
    _print_rows(("stage", "job", ""), rows, named=isinstance(spec, Sweep))
    if not any(each.did == "submitted" for done in outcomes.values() for each in done):
        click.echo(f"attached to the existing {noun}; nothing was submitted", err=True)
    click.echo("\nnext:", err=True)
    for verb in verbs:
        click.echo(f"  hpc-rlhf {verb} {shlex.quote(str(spec.run_dir))}", err=True)


def _submitted(outcome: Outcome) -> str:
    return {
        "submitted": "submitted",
        "live": f"already submitted: {outcome.detail}",
        "done": "already done",
        "waits": f"waits {outcome.detail}",
    }[outcome.did]


def _preview_sweep(sweep: Sweep) -> None:
    lent = shared(sweep)
    for member in sweep.members:
        refuse_changes(RunDir(Path(member.spec.run_dir)), member.spec, live=False)
    plan = [
        (member.name, stage, f"from {lender.path.name}" if lender else "a job")
        for member in sweep.members
        for stage in member.spec.stage_names
        for lender in [lent[member.name].get(stage)]
    ]
    print_table(("run", "stage", ""), plan)


def _preview(spec: JobSpec, beside: Path) -> None:
    plan = make_plan(spec)
    commands = preview(plan, spec, beside)
    print_plan(plan)
    click.echo(f"\nwould write {plan.run.job_yaml}, {plan.run.plan_json} and, in {plan.run.scripts}:")
    for job in plan.jobs:
        files = (
            plan.run.sbatch(job.stage),
            *([plan.run.sentinel(job.stage)] if job.slurm.heal.enabled else []),
            *(plan.run.ds_config(job.stage, model) for model in spec.stage(job.stage).strategies),
            plan.run.hostfile_template(job.stage),
        )
        click.echo("  " + "  ".join(path.name for path in files))
    click.echo("\nwould submit:")
    for job in plan.jobs:
        click.echo(f"  {commands.get(job.stage, f'{job.stage}: already done')}")
        if job.stage in commands and job.slurm.heal.enabled:
            click.echo(f"  and {plan.run.sentinel(job.stage).name}, which starts if that job fails")


@click.command(epilog=example("hpc-rlhf cancel my-job.yaml"))
@click.argument("run")
def cancel_command(run: str) -> None:
    """Cancel all queued and running jobs of RUN, a run directory or job file.

    For a sweep, the jobs of all its runs are cancelled. Checkpoints are kept: submit the same file again to
    resume.
    """
    runs = find_runs(run)
    # Later runs of a sweep may depend on earlier ones: cancel the dependents first.
    cancelled = {each.path.name: cancel(each) for each in reversed(runs)}
    rows = [(name, stage, job.job_id, job.state) for name, jobs in cancelled.items() for stage, job in jobs.items()]
    if rows:
        _print_rows(("stage", "job", "was"), rows, named=len(runs) > 1)
    else:
        click.echo("no job of this run is queued or running on Slurm", err=True)


@click.command(epilog=example("hpc-rlhf heal my-job.yaml"))
@click.argument("run")
@json_option
@click.option("--sentinel", is_flag=True, hidden=True, help="Stop where another attempt would not help.")
@click.pass_context
def heal_command(context: click.Context, run: str, as_json: bool, sentinel: bool) -> None:
    """Restart the failed stages of RUN, a run directory or job file, on Slurm.

    Stages resume from their last checkpoints; for a sweep, this covers all its runs. Each stage has a
    sentinel job that does the same automatically. Use this command when a stage has stopped and needs
    you, once you have fixed the cause.
    """
    runs = find_runs(run)
    alone = len(runs) == 1
    stops = _stops(runs[0])
    # In the order of a sweep, in which runs whose stages others share come first.
    outcomes = {each.path.name: heal(each, by_sentinel=sentinel) for each in runs}
    if as_json:
        facts = {name: [asdict(each) for each in done] for name, done in outcomes.items()}
        print_json(facts[runs[0].path.name] if alone else facts)
        return
    rows = [(name, each.stage, each.job_id or "-", _healed(each)) for name, done in outcomes.items() for each in done]
    _print_rows(("stage", "job", ""), rows, named=not alone)
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


def _print_rows(header: Sequence[str], rows: Iterable[Sequence[str]], named: bool) -> None:
    """Print rows that start with the name of their run, with or without that name."""
    print_table(("run", *header) if named else header, rows if named else [row[1:] for row in rows])
