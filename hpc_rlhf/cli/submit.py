"""hpc-rlhf submit: submit a spec's stages to Slurm."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, set_option
from hpc_rlhf.cli.console import print_table
from hpc_rlhf.cli.plan_tables import print_choice, print_plan
from hpc_rlhf.launch.auto import load
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.prepare import refuse_changes
from hpc_rlhf.launch.submit import preview, submit
from hpc_rlhf.launch.sweep import shared, submit_sweep
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep


@click.command(epilog=example("hpc-rlhf submit my-job.yaml --dry-run"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@click.option("--dry-run", is_flag=True, help="Show what would be submitted. Needs no Slurm and writes nothing.")
def command(file: Path, sets: tuple[str, ...], dry_run: bool) -> None:
    """Submit the stages of FILE to Slurm.

    Submitting the same file again attaches to the run: stages that are done, queued or running are left
    alone. The runs of a sweep are submitted together; a stage that several of them share is trained once.
    """
    spec = load(file, sets, print_choice)
    if isinstance(spec, Sweep):
        _submit_sweep(spec, file.parent, dry_run)
        return
    if dry_run:
        _print_preview(spec, file.parent)
        return
    outcomes = submit(spec, file.parent)
    print_table(
        ("stage", "job", ""), [(outcome.stage, outcome.job_id or "-", _result(outcome)) for outcome in outcomes]
    )
    if not any(outcome.did == "submitted" for outcome in outcomes):
        click.echo("attached to the existing run; nothing was submitted", err=True)
    click.echo(_next_commands(spec.run_dir), err=True)


def _submit_sweep(sweep: Sweep, beside: Path, dry_run: bool) -> None:
    if dry_run:
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
        return
    outcomes = [(name, each) for name, done in submit_sweep(sweep, beside).items() for each in done]
    rows = [(name, each.stage, each.job_id or "-", _result(each)) for name, each in outcomes]
    print_table(("run", "stage", "job", ""), rows)
    if not any(each.did == "submitted" for _, each in outcomes):
        click.echo("attached to the existing runs; nothing was submitted", err=True)
    click.echo(_next_commands(str(sweep.run_dir), ("status", "compare", "cancel")), err=True)


def _result(outcome: Outcome) -> str:
    return {
        "submitted": "submitted",
        "live": f"already submitted: {outcome.detail}",
        "done": "already done",
        "waits": f"waits {outcome.detail}",
    }[outcome.did]


def _next_commands(run_dir: str, verbs: tuple[str, ...] = ("status", "logs -f", "cancel")) -> str:
    from shlex import quote

    return "\n".join(("\nnext:", *(f"  hpc-rlhf {verb} {quote(run_dir)}" for verb in verbs)))


def _print_preview(spec: JobSpec, beside: Path) -> None:
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
