"""hpc-rlhf plan: show a spec's jobs, with memory and time estimates."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, json_option, print_overrides, set_option
from hpc_rlhf.cli.console import print_json, print_wrapped
from hpc_rlhf.cli.plan_tables import print_choices, print_memory, print_plan, print_sweep, print_times, print_verdict
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.estimate.stage_memory import Memory, run_memory
from hpc_rlhf.estimate.stage_time import StageTime, chain_seconds, run_times
from hpc_rlhf.estimate.step_time import assumptions
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.auto import Choice, load
from hpc_rlhf.launch.doctor import fit
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.submit import predicted_starts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep, lenders, specs_of


@click.command(epilog=example("hpc-rlhf plan my-job.yaml"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@json_option
@click.pass_context
def command(ctx: click.Context, file: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Show the jobs of FILE, their memory on each GPU and how long they take.

    Times are estimates from the FLOP/s and bandwidths of the GPU that slurm.gpu names; the assumptions are
    printed with them. For a sweep, it shows which run trains which stages, and the jobs, memory and times of
    the first run. The last line says whether all stages fit the GPUs that slurm.gpu names; if not, the exit
    code is 1.

    --json also has `fits`, which is null if slurm.gpu is not set, `auto`, what was chosen where FILE says
    auto, and on a Slurm cluster `starts`, when Slurm expects the stages without dependencies to start. For a
    sweep, it has the list `runs` with the plan of each, its `values`, and as `shared` the runs whose stages it
    uses, by stage.
    """
    choices: list[Choice] = []
    spec = load(file, sets, choices.append)
    print_overrides(file)
    findings = list(dict.fromkeys(finding for one in specs_of(spec) for finding in fit.check(one)))
    too_large = [finding for finding in findings if finding.level == "error"]
    if as_json:
        facts = _sweep_dict(spec) if isinstance(spec, Sweep) else _plan_dict(spec)
        facts["auto"] = {
            one.stage: {"chosen": dict(one.fields), "why": one.why, "considered": list(map(asdict, one.considered))}
            for one in choices
        }
        facts["starts"] = predicted_starts(make_plan(specs_of(spec)[0]), inputs.beside(file))
        print_json({"fits": not too_large if findings else None, **facts})
    else:
        _print(spec, inputs.beside(file), choices)
        print_verdict(findings)
    if too_large:
        ctx.exit(RUN_FAILED)


def _print(spec: JobSpec | Sweep, beside: Path | None, choices: list[Choice]) -> None:
    if isinstance(spec, Sweep):
        print_sweep(spec)
        click.echo()
        spec = specs_of(spec)[0]
    plan = make_plan(spec)
    print_plan(plan)
    print_choices(choices)
    print_memory(run_memory(spec))
    print_times(spec, run_times(spec))
    for stage, start in predicted_starts(plan, beside).items():
        print_wrapped(f"{stage}, submitted now: {start}")


def _plan_dict(spec: JobSpec) -> dict[str, object]:
    memory = {stage: _estimate_dict(each) for stage, each in run_memory(spec).items()}
    times = run_times(spec)
    facts = {
        "stages": {stage: _estimate_dict(each) for stage, each in times.items()},
        "chain_seconds": chain_seconds(spec, times),
        "assumed": assumptions(spec),
    }
    return {**make_plan(spec).as_dict(), "memory": memory, "time": facts}


def _sweep_dict(sweep: Sweep) -> dict[str, object]:
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


def _estimate_dict(estimate: StageTime | Memory | HpcRlhfError) -> dict[str, object]:
    if isinstance(estimate, HpcRlhfError):
        return {"unknown": str(estimate)}
    if isinstance(estimate, Memory):
        return {
            "parameters": estimate.parameters,
            "bytes_per_gpu": estimate.parts,
            "fullest": estimate.fullest,
            "held": estimate.held,
            "gpu": estimate.gpu,
            "left": estimate.left,
            "fits": estimate.fits,
        }
    return {
        "steps": estimate.steps,
        "samples_per_step": estimate.samples,
        "samples": estimate.expected,
        "step_seconds": estimate.step_seconds,
        "parts_of_a_step": estimate.parts,
        "seconds_per_1000_samples": estimate.per_thousand,
        "evaluation_seconds": estimate.evaluations,
        "seconds": estimate.seconds,
        "gpu_hours": estimate.gpu_hours,
        "attempts": estimate.attempts,
    }
