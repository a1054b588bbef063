"""hpc-rlhf eval: compare the models of a run on held-out data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from hpc_rlhf.cli.options import example, json_option, set_option
from hpc_rlhf.cli.run_argument import find_run
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec


@click.command("eval", epilog=example("hpc-rlhf eval my-job.yaml --prompts 200"))
@click.argument("run")
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    help="Held-out prompts to answer, in place of stages.eval.prompts.",
)
@set_option
@json_option
@click.pass_context
def command(
    context: click.Context, run: str, prompts: int | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Compare the models of RUN, a run directory or job file, on held-out data.

    Runs the stage eval on this machine, unless it is done and nothing else is asked for, and prints what it found.
    A spec without that stage is evaluated by its defaults. Ctrl-C saves; the same command goes on.
    """
    from hpc_rlhf.launch.prepare import evaluated_otherwise
    from hpc_rlhf.observe.evaluation import print_report, read_report

    folder = find_run(run)
    spec, file = asked_for(
        run, folder, sets if prompts is None else (*sets, f"stages.eval.prompts={prompts}")
    )
    done = manifest.is_done(folder.stage("eval"))
    if not done or evaluated_otherwise(folder, spec):
        _evaluate(context, spec, folder, file, _again(run, prompts, sets, as_json))
    report = read_report(folder)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    from rich.console import Console

    print_report(report, Console(highlight=False))


def asked_for(run: str, folder: RunDir, sets: tuple[str, ...]) -> tuple[JobSpec, Path]:
    """The spec of a run with a stage eval, and the file that it is of.

    Raises:
        HpcRlhfError: what is asked for is wrong, or not all of the run is trained.
    """
    from hpc_rlhf.launch.auto import load_one
    from hpc_rlhf.spec.sweep import Sweep, load_any

    file = Path(run) if Path(run).is_file() else folder.job_yaml
    # A sweep of which but one run is there yet: that run is meant.
    source = folder.job_yaml if isinstance(load_any(file), Sweep) else file
    if load_one(source).stages.eval is None:
        # As it was asked for last time, or by the defaults.
        last = read_spec(folder.job_yaml).stages.eval
        sets = ("stages.eval=" + json.dumps(last.model_dump(mode="json") if last else {}), *sets)
    spec = load_one(source, sets)
    missing = [stage for stage in spec.needs("eval") if not manifest.is_done(folder.stage(stage))]
    if missing:
        raise HpcRlhfError(
            f"there is nothing to evaluate yet: {' and '.join(missing)} "
            + ("is not finished" if len(missing) == 1 else "are not finished"),
            where=str(folder.path),
            hint=f"see how it is getting on: hpc-rlhf status {shlex.quote(str(folder.path))}",
        )
    return spec, file


def _evaluate(context: click.Context, spec: JobSpec, folder: RunDir, file: Path, again: str) -> None:
    from hpc_rlhf.launch.local.interrupts import Interrupted
    from hpc_rlhf.launch.local.runner import LocalRun, refuse_live_jobs
    from hpc_rlhf.launch.prepare import claim, prepare
    from hpc_rlhf.observe.terminal.progress import progress

    with claim(spec, "hpc-rlhf eval") as run:
        refuse_live_jobs(run)
        prepare(spec, run, None if file == folder.job_yaml else file.parent)
        try:
            with progress(run) as watcher:
                LocalRun(spec, run, None, watcher, again).run_stages(("eval",))
        except Interrupted as stop:  # asked for, so no error
            click.echo(str(stop), err=True)
            context.exit(stop.exit_code)


def _again(run: str, prompts: int | None, sets: tuple[str, ...], as_json: bool) -> str:
    words = ["hpc-rlhf", "eval", run]
    if prompts is not None:
        words += ["--prompts", str(prompts)]
    for change in sets:
        words += ["--set", change]
    return shlex.join([*words, "--json"] if as_json else words)
