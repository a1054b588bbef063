"""hpc-rlhf submit: submit a spec's stages to Slurm."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.options import example, set_option
from hpc_rlhf.cli.plan import echo_plan
from hpc_rlhf.cli.table import echo_table
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.submit import preview, submit
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.model import JobSpec


@click.command(epilog=example("hpc-rlhf submit my-job.yaml --dry-run"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@click.option("--dry-run", is_flag=True, help="Only say what would be done. Needs no Slurm, writes nothing.")
def command(file: Path, sets: tuple[str, ...], dry_run: bool) -> None:
    """Submit the stages of FILE to Slurm.

    Submitting again attaches to what is there: stages that are done, queued or running are left alone.
    """
    spec = load_spec(file, sets)
    if dry_run:
        _echo_preview(spec, file.parent)
        return
    outcomes = submit(spec, file.parent)
    echo_table(
        ("stage", "job", ""), [(outcome.stage, outcome.job_id or "-", _said(outcome)) for outcome in outcomes]
    )
    if not any(outcome.did == "submitted" for outcome in outcomes):
        click.echo("attached to the run that is there; nothing was submitted", err=True)
    click.echo(_next_commands(spec.run_dir), err=True)


def _said(outcome: Outcome) -> str:
    return {
        "submitted": "submitted",
        "live": f"already there: {outcome.detail}",
        "done": "done already",
    }[outcome.did]


def _next_commands(run_dir: str) -> str:
    from shlex import quote

    run = quote(run_dir)
    return f"\nnext:\n  hpc-rlhf status {run}\n  hpc-rlhf logs -f {run}\n  hpc-rlhf cancel {run}"


def _echo_preview(spec: JobSpec, beside: Path) -> None:
    plan = make_plan(spec)
    commands = preview(spec, beside)
    echo_plan(plan)
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
        click.echo(f"  {commands.get(job.stage, f'{job.stage}: done already')}")
        if job.stage in commands and job.slurm.heal.enabled:
            click.echo(f"  and {plan.run.sentinel(job.stage).name}, to start if that job ends badly")
