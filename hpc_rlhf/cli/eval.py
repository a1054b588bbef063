"""hpc-rlhf eval: evaluate a run's models on held-out data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, find_run, json_option, set_option
from hpc_rlhf.cli.console import print_parts
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import EVALUATION


@click.command("eval", epilog=example("hpc-rlhf eval my-job.yaml --prompts 200"))
@click.argument("run")
@click.option(
    "--prompts", type=click.IntRange(min=1), help="Number of held-out prompts, overriding stages.eval.prompts."
)
@set_option
@json_option
@click.pass_context
def command(context: click.Context, run: str, prompts: int | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Evaluate the models of RUN, a run directory or job file, on held-out data.

    Runs the eval stage on this machine, unless it is already done with the same settings, and prints the
    results. A spec without that stage is evaluated with its defaults. Ctrl-C saves and stops; the same
    command resumes.
    """
    from hpc_rlhf.launch.prepare import evaluation_changed
    from hpc_rlhf.observe.evaluation import read_report
    from hpc_rlhf.observe.terminal.results import evaluation

    folder = find_run(run)
    spec, file = evaluation_spec(
        run, folder, sets if prompts is None else (*sets, f"stages.{EVALUATION.name}.prompts={prompts}")
    )
    done = manifest.is_done(folder.stage(EVALUATION.name))
    if not done or evaluation_changed(folder, spec):
        _evaluate(context, spec, folder, file, _again(run, prompts, sets, as_json))
    report = read_report(folder)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    print_parts(lambda width, live, ascii_only: evaluation(report))


def evaluation_spec(run: str, folder: RunDir, sets: tuple[str, ...]) -> tuple[JobSpec, Path]:
    """The spec of a run with an eval stage, and its file.

    Raises:
        HpcRlhfError: the settings are wrong, or the run is not fully trained.
    """
    from hpc_rlhf.launch.auto import load_one
    from hpc_rlhf.spec.sweep import Sweep, load_any

    file = Path(run) if Path(run).is_file() else folder.job_yaml
    # RUN may be a sweep of which only one run exists yet.
    source = folder.job_yaml if isinstance(load_any(file), Sweep) else file
    if load_one(source).evaluation is None:
        # The settings of the last evaluation, or the defaults.
        last = read_spec(folder.job_yaml).evaluation
        fields = last.model_dump(mode="json") if last else {}
        sets = (f"stages.{EVALUATION.name}={json.dumps(fields)}", *sets)
    spec = load_one(source, sets)
    missing = [stage for stage in spec.needs(EVALUATION.name) if not manifest.is_done(folder.stage(stage))]
    if missing:
        raise HpcRlhfError(
            f"there is nothing to evaluate yet: {' and '.join(missing)} "
            + ("is not finished" if len(missing) == 1 else "are not finished"),
            where=str(folder.path),
            hint=f"to see the progress: hpc-rlhf status {shlex.quote(str(folder.path))}",
        )
    return spec, file


def _evaluate(context: click.Context, spec: JobSpec, folder: RunDir, file: Path, again: str) -> None:
    from hpc_rlhf.launch.local.runner import Interrupted, LocalRun, refuse_live_jobs
    from hpc_rlhf.launch.prepare import claim, prepare
    from hpc_rlhf.observe.terminal.progress import progress

    with claim(spec, "hpc-rlhf eval") as run:
        refuse_live_jobs(run)
        prepare(spec, run, None if file == folder.job_yaml else file.parent)
        try:
            with progress(run) as watcher:
                LocalRun(spec, run, None, watcher, again).run_stages((EVALUATION.name,))
        except Interrupted as stop:  # the user asked for it: no error
            click.echo(str(stop), err=True)
            context.exit(stop.exit_code)


def _again(run: str, prompts: int | None, sets: tuple[str, ...], as_json: bool) -> str:
    words = ["hpc-rlhf", "eval", run]
    if prompts is not None:
        words += ["--prompts", str(prompts)]
    for change in sets:
        words += ["--set", change]
    return shlex.join([*words, "--json"] if as_json else words)
