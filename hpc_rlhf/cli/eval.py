"""hpc-rlhf eval: evaluate a run's models on held-out data."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, json_option, run_argument, set_option
from hpc_rlhf.cli.console import print_parts
from hpc_rlhf.cli.run import run_stages, set_arguments
from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.auto import load_one
from hpc_rlhf.launch.changes import evaluation_changed
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.models import unfinished
from hpc_rlhf.observe.results import read_report
from hpc_rlhf.run import acting, manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import EVALUATION
from hpc_rlhf.spec.sweep import Sweep, load_any


@click.command(epilog=example("hpc-rlhf eval my-job.yaml --prompts 200"))
@run_argument
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
    from hpc_rlhf.observe.terminal.results import evaluation

    folder = find_run(run)
    number = [] if prompts is None else [f"stages.{EVALUATION.name}.prompts={prompts}"]
    is_done = manifest.is_done(folder.stage(EVALUATION.name))
    if not is_done or sets or number or Path(run).is_file():
        spec, beside = _evaluation_spec(run, folder, (*sets, *number))
        if beside is not None:
            inputs.check(Path(run))
        if not is_done or evaluation_changed(folder, spec):
            words = [run, *([] if prompts is None else ["--prompts", str(prompts)]), *set_arguments(sets)]
            if as_json:
                words.append("--json")
            run_stages(context, "eval", words, spec, beside, stages=(EVALUATION.name,))
    report = read_report(folder)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    print_parts(lambda width, live, ascii_only: evaluation(report))


def _evaluation_spec(run: str, folder: RunDir, sets: tuple[str, ...]) -> tuple[JobSpec, Path | None]:
    """The spec of a run with an eval stage, and the folder of its file unless that is the run directory."""
    file = Path(run) if Path(run).is_file() else folder.job_yaml
    # RUN may be a sweep of which only one run exists yet.
    source = folder.job_yaml if isinstance(load_any(file), Sweep) else file
    if load_one(source).evaluation is None:
        # The settings of the last evaluation, or the defaults.
        last = read_spec(folder.job_yaml).evaluation
        fields = last.model_dump(mode="json") if last else {}
        sets = (f"stages.{EVALUATION.name}={json.dumps(fields)}", *sets)
    spec = load_one(source, sets)
    if not acting.is_same_folder(Path(spec.run_dir), folder.path):
        raise HpcRlhfError(f"an evaluation of {run} would write to {spec.run_dir}", hint="leave run_dir as it is")
    missing = [stage for stage in spec.needs(EVALUATION.name) if not manifest.is_done(folder.stage(stage))]
    if missing:
        raise unfinished(folder, "there is nothing to evaluate yet", missing, INPUT_WRONG)
    return spec, None if file == folder.job_yaml else inputs.beside(file)
