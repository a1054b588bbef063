"""The tables of a plan: jobs, memory, times, what `auto` chose, and the runs of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

import click

from hpc_rlhf.cli.console import print_table, print_wrapped
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.stage_memory import RESERVE, Memory
from hpc_rlhf.estimate.stage_time import StageTime, chain_seconds
from hpc_rlhf.estimate.step_time import assumptions
from hpc_rlhf.launch.auto import Choice, describe
from hpc_rlhf.launch.doctor.finding import Finding
from hpc_rlhf.launch.plan import Plan
from hpc_rlhf.launch.waves import wave_size
from hpc_rlhf.run.format import duration
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep, lenders

# Alternatives to what `auto` chose that are shown: the fastest that fit, and the fastest that do not.
_MAX_FITTING, _MAX_TOO_LARGE = 4, 2


def print_sweep(sweep: Sweep) -> None:
    """Print which run of a sweep trains which stages, or what is searched."""
    if sweep.search is not None:
        print_wrapped(f"{sweep.summary}, {wave_size(sweep)} at once; folder {sweep.run_dir}")
        return
    lent = lenders(sweep.specs)
    rows = []
    for name, spec in sweep.specs.items():
        own = [stage for stage in spec.stage_names if (name, stage) not in lent]
        shared: dict[str, list[str]] = {}
        for stage in spec.stage_names:
            if (name, stage) in lent:
                shared.setdefault(lent[name, stage], []).append(stage)
        sources = "; ".join(f"{', '.join(stages)} from {lender}" for lender, stages in shared.items())
        rows.append((name, ", ".join(own) or "-", sources or "-"))
    print_table(("run", "trains", "uses"), rows)
    limit = "" if sweep.limit is None else f", at most {sweep.limit} at once"
    print_wrapped(f"{sweep.summary}{limit}; folder {sweep.run_dir}")


def print_plan(plan: Plan) -> None:
    """Print a row for each job."""
    rows = [
        (
            job.stage,
            ", ".join(job.needs) or "-",
            str(job.nodes),
            str(job.slurm.ranks),
            str(job.nodes * job.slurm.gpus_per_node),
            f"{job.batch.global_} = {job.batch.micro} x {job.batch.accumulation} x {job.batch.ranks}",
            job.slurm.partition or "default",
            job.slurm.time,
        )
        for job in plan.jobs
    ]
    header = ("stage", "needs", "nodes", "ranks", "gpus", "batch", "partition", "time")
    print_table(header, rows, right=("nodes", "ranks", "gpus"))
    grouped = [job for job in plan.jobs if job.batch.ranks < job.slurm.ranks]
    replicas = "ranks, or groups of ranks with the same samples" if grouped else "ranks"
    print_wrapped(f"batch = micro batch x accumulation x {replicas}; run directory {plan.run.path}")
    for job in grouped:
        sizes = " x ".join(f"{name} {size}" for name, size in job.layout.items() if size > 1 or name == "data")
        print_wrapped(f"{job.stage}: ranks by {sizes}; neighbouring ranks differ in the last")


def print_choice(choice: Choice) -> None:
    """Print what `auto` chose for a stage, on one line."""
    print_wrapped(f"{choice.stage}: {describe(choice.fields)}, {choice.why}")


def print_choices(choices: Sequence[Choice]) -> None:
    """Print what `auto` chose beside the best alternatives, and why."""
    rows = [row for choice in choices for row in _choice_rows(choice)]
    if rows:
        click.echo()
        print_table(("stage", "considered", "time", "GiB", ""), rows, right=("time", "GiB"))
    for choice in choices:
        print_choice(choice)


def _choice_rows(choice: Choice) -> list[tuple[str, ...]]:
    """The chosen combination and the best alternatives; none if nothing was considered."""
    chosen = [one for one in choice.considered if one.fields == choice.fields]
    others = [one for one in choice.considered if one.fields != choice.fields]
    fitting = [one for one in others if one.fits][:_MAX_FITTING]
    too_large = [one for one in others if not one.fits][:_MAX_TOO_LARGE]
    return [
        (
            "" if place else choice.stage,
            describe(one.fields),
            f"x {one.seconds / chosen[0].seconds:.2f}",
            _gib(one.held),
            "" if place and one.fits else "too large" if place else "chosen",
        )
        for place, one in enumerate([*chosen, *fitting, *too_large])
    ]


def print_memory(estimates: dict[str, Memory | HpcRlhfError]) -> None:
    """Print what each stage holds on a GPU at its peak, a row for each part."""
    rows: list[tuple[str, ...]] = []
    notes = []
    for stage, memory in estimates.items():
        if isinstance(memory, HpcRlhfError):
            notes.append(f"{stage}: no memory estimate: {memory}")
            continue
        for number, (part, size) in enumerate(memory.parts.items()):
            rows.append(("" if number else stage, part, _gib(size), ""))
        rows.append(("", f"total at the peak ({memory.fullest})", _gib(memory.held), ""))
        if memory.gpu is not None and memory.left is not None:
            verdict = "DOES NOT FIT" if memory.left < 0 else "" if memory.fits else "TIGHT"
            rows.append(("", f"free, of {_gib(memory.gpu)} per GPU", _gib(memory.left), verdict))
        sizes = ", ".join(f"{model} {_billions(count)}" for model, count in memory.parameters.items())
        notes.append(f"{stage}: parameters of {sizes}")
    if rows:
        click.echo()
        print_table(("stage", "held on each GPU", "GiB", ""), rows, right=("GiB",))
    for note in notes:
        print_wrapped(note)
    if rows:
        print_wrapped(
            "peak memory of tensors, with every sequence at its maximum length; leave "
            f"{RESERVE:.0%} of a GPU for CUDA, NCCL and fragmentation"
        )


def print_times(spec: JobSpec, estimates: dict[str, StageTime | HpcRlhfError]) -> None:
    """Print how long each stage trains, and the whole chain."""
    rows, notes, hours = [], [], 0.0
    unknown: dict[str, list[str]] = {}
    for stage, estimate in estimates.items():
        if isinstance(estimate, HpcRlhfError):
            reason = f"{estimate.message}; {estimate.hint}" if estimate.hint else estimate.message
            unknown.setdefault(reason, []).append(stage)
            continue
        rows.append((stage, *_time_cells(estimate)))
        hours += estimate.gpu_hours or 0.0
        if (estimate.attempts or 1) > 1:
            limit = spec.stage(stage).slurm.time
            notes.append(f"{stage} needs about {estimate.attempts} attempts of {limit}: it saves, requeues and resumes")
    whole = chain_seconds(spec, estimates)
    if whole is not None and len(rows) > 1:
        rows.append(("total", "", "", "", _brief(whole), _hours(hours)))
    if rows:
        click.echo()
        header = ("stage", "steps", "per step", "mostly", "time", "GPU-hours")
        print_table(header, rows, right=("steps", "per step", "time", "GPU-hours"))
        if any(row[1] == "?" for row in rows):
            print_wrapped("per 1,000: per 1,000 samples, because the number of samples is not known here")
        print_wrapped(assumptions(spec))
    notes += [f"{', '.join(stages)}: {reason}" for reason, stages in unknown.items()]
    for note in notes:
        print_wrapped(note)


def print_verdict(findings: Sequence[Finding]) -> None:
    """Print a line for each stage that does not fit its GPUs or fits tightly, or else that every stage fits.

    Args:
        findings: those of ``fit.check``.
    """
    for finding in findings:
        if finding.level != "ok":
            words = finding.message.replace("does not fit", "DOES NOT FIT").replace("tight", "TIGHT")
            print_wrapped(f"{finding.where}: {words}; {finding.fix.partition(';')[0]}", err=False)
    if findings and all(finding.level == "ok" for finding in findings):
        print_wrapped("every stage fits its GPUs", err=False)


def _time_cells(estimate: StageTime) -> tuple[str, ...]:
    longest = max(estimate.parts, key=lambda part: estimate.parts[part])
    share = f"{longest} {estimate.parts[longest] / estimate.step_seconds:.0%}"
    step = _brief(estimate.step_seconds)
    if estimate.steps is None or estimate.seconds is None or estimate.gpu_hours is None:
        per_thousand = estimate.per_thousand
        hours = _hours(per_thousand * estimate.gpus / 3600)
        return "?", step, share, f"{_brief(per_thousand)} per 1,000", hours
    return f"{estimate.steps:,}", step, share, _brief(estimate.seconds), _hours(estimate.gpu_hours)


def _brief(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else "< 0.1"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
