"""hpc-rlhf submit: submit a spec's stages to Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, print_overrides, set_option
from hpc_rlhf.cli.console import print_rows, print_table, print_wrapped
from hpc_rlhf.cli.heal import STOPPED_FOR_GOOD
from hpc_rlhf.cli.plan_tables import print_choice, print_plan
from hpc_rlhf.cli.reuse import find_reused, reuse_option
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.auto import load
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.changes import refuse_changes
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.preflight import objections, sentence
from hpc_rlhf.launch.search import SearchStuck
from hpc_rlhf.launch.submit import preview, submit
from hpc_rlhf.launch.sweep import shared, submit_sweep
from hpc_rlhf.launch.waves import submit_search, wave_size
from hpc_rlhf.observe.compare import measure
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep


@click.command(epilog=example("hpc-rlhf submit my-job.yaml --dry-run"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@reuse_option
@click.option("--dry-run", is_flag=True, help="Show what would be submitted. Needs no Slurm and writes nothing.")
@click.option("--force", is_flag=True, help="Submit even if a stage does not fit its GPUs, or the disk is too small.")
@click.option("--sentinel", is_flag=True, hidden=True, help="Go on with a search, and leave what failed to the user.")
@click.pass_context
def command(
    context: click.Context, file: Path, sets: tuple[str, ...], other: str | None, dry_run: bool, force: bool,
    sentinel: bool,
) -> None:  # fmt: skip
    """Submit the stages of FILE to Slurm.

    Submitting the same file again attaches to the run: stages that are done, queued or running are left
    alone. The runs of a sweep are submitted together; a stage that several of them share is trained once. Of a
    search, one wave of trials is submitted, and a small job that starts the next one when all of them have ended.

    If a stage that has no job yet does not fit the GPU that slurm.gpu names, or the run directory's disk has too
    little space, nothing is submitted unless --force is given.

    With --reuse, a new run takes finished stages of an earlier one: give it a changed spec and a run_dir of its
    own, and only the stages that the changes affect are trained. Their files are linked if possible, so either
    run can be removed.
    """
    spec = load(file, sets, print_choice)
    print_overrides(file)
    inputs.check(file)
    reused = find_reused(spec, other)
    if not sentinel:
        _check_fit(spec, reused, force or dry_run)
    if dry_run:
        if isinstance(spec, Sweep):
            _preview_sweep(spec, reused)
        else:
            _preview(spec, inputs.beside(file), reused.get("", {}))
        return
    if isinstance(spec, Sweep) and spec.search is not None:
        outcomes, noun = _submit_search(context, spec, inputs.beside(file), sentinel), "trials"
    elif isinstance(spec, Sweep):
        outcomes, noun = submit_sweep(spec, inputs.beside(file), reused), "runs"
    else:
        outcomes, noun = {"": submit(spec, inputs.beside(file), reused=reused.get(""))}, "run"
    rows = [
        (name, each.stage, each.job_id or "-", _submitted(each)) for name, of_run in outcomes.items() for each in of_run
    ]
    if rows:
        print_rows(("stage", "job", ""), rows, named=isinstance(spec, Sweep))
    did = {each.did for of_run in outcomes.values() for each in of_run}
    if not did - {"done"}:
        click.echo(f"the {noun} {'is' if noun == 'run' else 'are'} finished; nothing was submitted", err=True)
    elif "submitted" not in did:
        click.echo(f"attached to the existing {noun}; nothing was submitted", err=True)
    click.echo("\nnext:", err=True)
    for verb in next_verbs(spec, finished=not did - {"done"}):
        click.echo(f"  hpc-rlhf {verb} {shlex.quote(str(spec.run_dir))}", err=True)


def _submit_search(
    context: click.Context, sweep: Sweep, beside: Path | None, sentinel: bool
) -> dict[str, list[Outcome]]:
    """Submit a wave of trials. A sentinel that cannot go on ends as one that needs the user."""
    assert sweep.search is not None
    try:
        return submit_search(sweep, beside, partial(measure, metric=sweep.search.metric), sentinel)
    except SearchStuck as error:
        if not sentinel:
            raise
        click.echo(str(error), err=True)
        context.exit(STOPPED_FOR_GOOD)


def _check_fit(spec: JobSpec | Sweep, reused: Mapping[str, Collection[str]], anyway: bool) -> None:
    """Print a warning for each stage that may not fit its GPUs, and if the disk may be too small.

    Raises:
        HpcRlhfError: not ``anyway``, and a run would fail, going by the estimates.
    """
    findings = objections(spec, reused)
    lines = list(map(sentence, findings))
    if not anyway and any(each.level == "error" for each in findings):
        heading = "nothing was submitted, because the run would fail, going by estimates:"
        raise HpcRlhfError("\n".join([heading, *lines]), hint="to submit it anyway: --force")
    for line in lines:
        print_wrapped(f"warning: {line}")


def next_verbs(spec: JobSpec | Sweep, finished: bool) -> tuple[str, ...]:
    """The verbs that help after a submit."""
    if isinstance(spec, Sweep):
        return ("compare",) if finished else ("status", "compare", "cancel")
    if not finished:
        return "status", "logs -f", "cancel"
    return ("report", "chat") if spec.policies else ("report",)


def _submitted(outcome: Outcome) -> str:
    return {
        "submitted": "submitted",
        "live": f"already submitted: {outcome.detail}",
        "done": "already done",
        "waits": f"waits {outcome.detail}",
    }[outcome.did]


def _preview_sweep(sweep: Sweep, reused: Mapping[str, Mapping[str, RunDir]]) -> None:
    if sweep.search is not None:
        click.echo(f"would submit up to {wave_size(sweep)} trials at a time: {sweep.summary}")
        return
    lent = shared(sweep)
    for member in sweep.members:
        refuse_changes(RunDir(Path(member.spec.run_dir)), member.spec, live=False)
    plan = [
        (member.name, stage, f"from {lender.path.name}" if lender else "a job")
        for member in sweep.members
        for stage in member.spec.stage_names
        for lender in [lent[member.name].get(stage) or reused.get(member.name, {}).get(stage)]
    ]
    print_table(("run", "stage", ""), plan)


def _preview(spec: JobSpec, beside: Path | None, reused: Mapping[str, RunDir]) -> None:
    plan = make_plan(spec)
    commands = preview(plan, spec, beside, reused)
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
        done = f"reused from {reused[job.stage].path}" if job.stage in reused else "already done"
        click.echo(f"  {commands.get(job.stage, f'{job.stage}: {done}')}")
        if job.stage in commands and job.slurm.heal.enabled:
            click.echo(f"  and {plan.run.sentinel(job.stage).name}, which starts if that job fails")
