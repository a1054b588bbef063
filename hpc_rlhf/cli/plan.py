"""hpc-rlhf plan: show the jobs that a spec makes, and what their models take of each GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hpc_rlhf.cli.options import example, json_option, set_option
from hpc_rlhf.cli.table import echo_table
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.memory import Memory, run_memory
from hpc_rlhf.launch.plan import Plan, make_plan
from hpc_rlhf.spec.model import JobSpec
from hpc_rlhf.spec.sweep import Sweep, lenders, load_any


@click.command(epilog=example("hpc-rlhf plan my-job.yaml"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@json_option
def command(file: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Show the jobs that FILE makes, and the memory that their models hold on each GPU.

    Of a sweep: which run trains which stages, and the jobs and memory of the first run. --json has all of them, as a list
    `runs`, each with its `values` and the runs that it has stages from, by stage, as `shared`.
    """
    spec = load_any(file, sets)
    if as_json:
        facts = _sweep_dict(spec) if isinstance(spec, Sweep) else _plan_dict(spec)
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    if isinstance(spec, Sweep):
        echo_sweep(spec)
        click.echo()
        spec = spec.members[0].spec
    echo_plan(make_plan(spec))
    echo_memory(run_memory(spec))


def echo_sweep(sweep: Sweep) -> None:
    """Print which run of a sweep trains which stages."""
    lent = lenders(sweep.specs)
    rows = []
    for name, spec in sweep.specs.items():
        own = [stage for stage in spec.stage_names if (name, stage) not in lent]
        others: dict[str, list[str]] = {}
        for stage in spec.stage_names:
            if (name, stage) in lent:
                others.setdefault(lent[name, stage], []).append(stage)
        shares = "; ".join(f"{', '.join(stages)} of {lender}" for lender, stages in others.items())
        rows.append((name, ", ".join(own) or "-", shares or "-"))
    echo_table(("run", "trains", "shares"), rows)
    limit = "" if sweep.limit is None else f", at most {sweep.limit} at once"
    click.echo(f"{sweep.told}{limit}; folder {sweep.run_dir}", err=True)


def _plan_dict(spec: JobSpec) -> dict[str, Any]:
    memory = {stage: _memory_dict(each) for stage, each in run_memory(spec).items()}
    return {**make_plan(spec).as_dict(), "memory": memory}


def _sweep_dict(sweep: Sweep) -> dict[str, Any]:
    lent = lenders(sweep.specs)
    runs = [
        {
            "values": dict(member.values),
            "shared": {stage: lender for (name, stage), lender in lent.items() if name == member.name},
            **_plan_dict(member.spec),
        }
        for member in sweep.members
    ]
    return {"run_dir": str(sweep.run_dir), "limit": sweep.limit, "runs": runs}


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


def echo_memory(memory: dict[str, Memory | HpcRlhfError]) -> None:
    """Print what the models of each stage hold, a line a part, so that it fits a narrow terminal."""
    rows, notes = [], []
    for stage, found in memory.items():
        if isinstance(found, HpcRlhfError):
            notes.append(f"{stage}: no memory is planned: {found}")
            continue
        sizes = ", ".join(f"{model} {_billions(count)}" for model, count in found.parameters.items())
        for number, (part, size) in enumerate(found.parts.items()):
            rows.append(("" if number else stage, part, _gib(size)))
        rows.append(("", "together", _gib(found.held)))
        if found.gpu is not None and found.left is not None:
            rows.append(
                (
                    "",
                    f"left of the {_gib(found.gpu).strip()} of a GPU",
                    _gib(found.left) + (" DOES NOT FIT" if found.left < 0 else ""),
                )
            )
        notes.append(f"{stage}: parameters of {sizes}")
    if rows:
        click.echo()
        echo_table(("stage", "held on each GPU", "GiB"), rows)
    for note in notes:
        click.echo(note, err=True)
    if rows:
        click.echo(
            "not counted: activations and logits, which grow with the micro batch, and CUDA's own memory;"
            " they need what is left",
            err=True,
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:8.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _memory_dict(found: Memory | HpcRlhfError) -> dict[str, object]:
    if isinstance(found, HpcRlhfError):
        return {"unknown": str(found)}
    return {
        "parameters": found.parameters,
        "bytes_per_gpu": found.parts,
        "held": found.held,
        "gpu": found.gpu,
        "left": found.left,
    }
