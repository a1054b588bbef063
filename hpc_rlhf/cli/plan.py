"""hpc-rlhf plan: show the jobs that a spec makes."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.options import example, json_option, set_option
from hpc_rlhf.cli.table import echo_table
from hpc_rlhf.launch.plan import Plan, make_plan
from hpc_rlhf.spec.load import load_spec


@click.command(epilog=example("hpc-rlhf plan my-job.yaml"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@json_option
def command(file: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Show the jobs that FILE makes."""
    plan = make_plan(load_spec(file, sets))
    if as_json:
        click.echo(plan.to_json(), nl=False)
    else:
        echo_plan(plan)


def echo_plan(plan: Plan) -> None:
    """Print the plan as a table."""
    header = ("stage", "needs", "nodes", "ranks", "gpus", "batch", "partition", "time")
    rows = []
    for job in plan.jobs:
        batch, slurm = job.batch, job.slurm
        rows.append(
            (
                job.stage,
                ", ".join(job.needs) or "-",
                str(slurm.nodes),
                str(slurm.ranks),
                str(slurm.nodes * slurm.gpus_per_node),
                f"{batch.global_} = {batch.micro} x {batch.accumulation} x {batch.ranks}",
                slurm.partition or "default",
                slurm.time,
            )
        )
    echo_table(header, rows)
    grouped = any(job.batch.ranks < job.slurm.ranks for job in plan.jobs)
    sharers = "ranks, or groups of tensor_parallel ranks" if grouped else "ranks"
    click.echo(f"batch = micro batch x accumulation x {sharers}; run directory {plan.run.path}", err=True)
