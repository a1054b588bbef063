"""hpc-rlhf plan: show the jobs that a spec makes, what they take of each GPU, and how long they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hpc_rlhf.cli.choice import choice_dict, echo_choices
from hpc_rlhf.cli.options import example, json_option, set_option
from hpc_rlhf.cli.table import echo_table, echo_words
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.stage_memory import RESERVE, Memory, run_memory
from hpc_rlhf.estimate.stage_time import StageTime, chain_seconds, run_times
from hpc_rlhf.estimate.step_time import ASSUMPTIONS
from hpc_rlhf.launch.auto import Choice, load
from hpc_rlhf.launch.plan import Plan, make_plan
from hpc_rlhf.launch.start_estimate import predicted_starts
from hpc_rlhf.observe.format import duration
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep, lenders, specs_of


@click.command(epilog=example("hpc-rlhf plan my-job.yaml"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@json_option
def command(file: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Show the jobs that FILE makes, the memory that they take of each GPU, and how long they take.

    The time is an estimate from the FLOP/s and bandwidths of the GPU that slurm.gpu names; it tells what it assumes.

    Of a sweep: which run trains which stages, and the jobs and memory of the first run. --json has all of them, as a list
    `runs`, each with its `values` and the runs that it has stages from, by stage, as `shared`. Where Slurm is, `starts` has what
    it says of each stage that waits for no other; `auto` what was chosen where FILE says auto.
    """
    choices: list[Choice] = []
    spec = load(file, sets, choices.append)
    if as_json:
        facts = _sweep_dict(spec) if isinstance(spec, Sweep) else _plan_dict(spec)
        facts["auto"] = {choice.stage: choice_dict(choice) for choice in choices}
        facts["starts"] = predicted_starts(make_plan(specs_of(spec)[0]), file.parent)
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    if isinstance(spec, Sweep):
        echo_sweep(spec)
        click.echo()
        spec = specs_of(spec)[0]
    plan = make_plan(spec)
    echo_plan(plan)
    echo_choices(choices)
    echo_memory(run_memory(spec))
    echo_times(spec, run_times(spec))
    for stage, start in predicted_starts(plan, file.parent).items():
        echo_words(f"{stage}, submitted now: {start}")


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
    echo_words(f"{sweep.told}{limit}; folder {sweep.run_dir}")


def _plan_dict(spec: JobSpec) -> dict[str, Any]:
    memory = {stage: _memory_dict(each) for stage, each in run_memory(spec).items()}
    times = run_times(spec)
    facts = {
        "stages": {stage: _time_dict(each) for stage, each in times.items()},
        "chain_seconds": chain_seconds(spec, times),
        "assumed": ASSUMPTIONS,
    }
    return {**make_plan(spec).as_dict(), "memory": memory, "time": facts}


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
    echo_words(f"batch = micro batch x accumulation x {sharers}; run directory {plan.run.path}")


def echo_memory(memory: dict[str, Memory | HpcRlhfError]) -> None:
    """Print what each stage holds when it holds most, a line a part, so that it fits a narrow terminal."""
    rows, notes = [], []
    for stage, found in memory.items():
        if isinstance(found, HpcRlhfError):
            notes.append(f"{stage}: no memory is planned: {found}")
            continue
        sizes = ", ".join(f"{model} {_billions(count)}" for model, count in found.parameters.items())
        for number, (part, size) in enumerate(found.parts.items()):
            rows.append(("" if number else stage, part, _gib(size)))
        rows.append(("", f"together, in its {found.fullest}", _gib(found.held)))
        if found.gpu is not None and found.left is not None:
            verdict = " DOES NOT FIT" if found.left < 0 else "" if found.fits else " TIGHT"
            rows.append(("", f"left of the {_gib(found.gpu).strip()} of a GPU", _gib(found.left) + verdict))
        notes.append(f"{stage}: parameters of {sizes}")
    if rows:
        click.echo()
        echo_table(("stage", "held on each GPU", "     GiB"), rows)
    for note in notes:
        echo_words(note)
    if rows:
        echo_words(
            f"most that tensors take at a time, every sequence of its greatest length; {RESERVE:.0%} of a GPU should be "
            "left for CUDA, NCCL and gaps between tensors"
        )


def echo_times(spec: JobSpec, times: dict[str, StageTime | HpcRlhfError]) -> None:
    """Print how long each stage trains, and the chain of them."""
    rows, notes, hours = [], [], 0.0
    unknown: dict[str, list[str]] = {}
    for stage, found in times.items():
        if isinstance(found, HpcRlhfError):
            unknown.setdefault(f"{found.message}; {found.hint}".removesuffix("; None"), []).append(stage)
            continue
        rows.append((stage, *_time_cells(found)))
        hours += found.gpu_hours or 0.0
        if (found.attempts or 1) > 1:
            notes.append(
                f"{stage} needs about {found.attempts} attempts of {spec.stage(stage).slurm.time}: it saves, requeues and goes on"
            )
    whole = chain_seconds(spec, times)
    if whole is not None and len(rows) > 1:
        rows.append(("together", "", "", "", _brief(whole), _hours(hours)))
    if rows:
        click.echo()
        echo_table(("stage", "steps", "a step", "mostly", "time", "GPU-hours"), rows)
        if any(row[1] == "?" for row in rows):
            echo_words("per 1,000: for each 1,000 samples, because their number is not known here")
        echo_words(ASSUMPTIONS)
    notes += [f"{', '.join(stages)}: {why}" for why, stages in unknown.items()]
    for note in notes:
        echo_words(note)


def _time_cells(found: StageTime) -> tuple[str, ...]:
    longest = max(found.parts, key=lambda part: found.parts[part])
    share = f"{longest} {found.parts[longest] / found.step_seconds:.0%}"
    if found.steps is None or found.seconds is None or found.gpu_hours is None:
        per_thousand = found.per_thousand
        together = f"{_brief(per_thousand)} per 1,000"
        return "?", _brief(found.step_seconds), share, together, _hours(per_thousand * found.gpus / 3600)
    return (
        f"{found.steps:,}",
        _brief(found.step_seconds),
        share,
        _brief(found.seconds),
        _hours(found.gpu_hours),
    )


def _brief(seconds: float) -> str:
    return (
        f"{seconds * 1000:.0f} ms"
        if seconds < 1
        else f"{seconds:.1f} s"
        if seconds < 60
        else duration(seconds)
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else "< 0.1"


def _time_dict(found: StageTime | HpcRlhfError) -> dict[str, object]:
    if isinstance(found, HpcRlhfError):
        return {"unknown": str(found)}
    return {
        "steps": found.steps,
        "samples_per_step": found.samples,
        "samples": found.expected,
        "step_seconds": found.step_seconds,
        "parts_of_a_step": found.parts,
        "seconds_per_1000_samples": found.per_thousand,
        "seconds": found.seconds,
        "gpu_hours": found.gpu_hours,
        "attempts": found.attempts,
    }


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
        "fullest": found.fullest,
        "held": found.held,
        "gpu": found.gpu,
        "left": found.left,
        "fits": found.fits,
    }
