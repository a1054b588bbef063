"""Verbs that run stages on this machine, without Slurm: run, eval."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, find_run, json_option, set_option, unfinished
from hpc_rlhf.cli.console import print_parts
from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.stages import EVALUATION


@click.command(
    epilog=example("hpc-rlhf run jobs/tiny.yaml", "hpc-rlhf run my-job.yaml --hostfile hostfiles/lab.hostfile")
)
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="Run on the machines in this file through DeepSpeed's launcher, not only on this one.",
)
@click.pass_context
def run_command(context: click.Context, file: Path, sets: tuple[str, ...], hostfile: Path | None) -> None:
    """Run a spec's stages on this machine, without Slurm.

    All ranks that the spec asks for start here. Ctrl-C saves and stops; the same command resumes. Finished
    stages are skipped. The runs of a sweep run one after the other.
    """
    from hpc_rlhf.cli.plan_tables import print_choice
    from hpc_rlhf.launch.auto import load
    from hpc_rlhf.launch.sweep import lay_out
    from hpc_rlhf.observe.terminal.results import summary
    from hpc_rlhf.spec.sweep import Sweep

    def run_one(spec: JobSpec, lent: Mapping[str, RunDir]) -> None:
        words = [str(file), *_changes(sets)]
        if hostfile is not None:
            words += ["--hostfile", str(hostfile)]
        run = _run_stages(context, "run", words, spec, file.parent, hostfile, lent)
        print_parts(lambda width, live, ascii_only: summary(run, width))

    spec = load(file, sets, print_choice)
    if not isinstance(spec, Sweep):
        run_one(spec, {})
        return
    lent = lay_out(spec)
    for number, member in enumerate(spec.members, 1):
        click.echo(f"run {number} of {len(spec.members)}: {member.name}", err=True)
        run_one(member.spec, lent[member.name])


@click.command(epilog=example("hpc-rlhf eval my-job.yaml --prompts 200"))
@click.argument("run")
@click.option(
    "--prompts", type=click.IntRange(min=1), help="Number of held-out prompts, overriding stages.eval.prompts."
)
@set_option
@json_option
@click.pass_context
def eval_command(context: click.Context, run: str, prompts: int | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Evaluate the models of RUN, a run directory or job file, on held-out data.

    Runs the eval stage on this machine, unless it is already done with the same settings, and prints the
    results. A spec without that stage is evaluated with its defaults. Ctrl-C saves and stops; the same
    command resumes.
    """
    from hpc_rlhf.launch.prepare import evaluation_changed
    from hpc_rlhf.observe.results import read_report
    from hpc_rlhf.observe.terminal.results import evaluation

    folder = find_run(run)
    number = [] if prompts is None else [f"stages.{EVALUATION.name}.prompts={prompts}"]
    spec, beside = _evaluation_spec(run, folder, (*sets, *number))
    if not manifest.is_done(folder.stage(EVALUATION.name)) or evaluation_changed(folder, spec):
        words = [run, *([] if prompts is None else ["--prompts", str(prompts)]), *_changes(sets)]
        if as_json:
            words.append("--json")
        _run_stages(context, "eval", words, spec, beside, stages=(EVALUATION.name,))
    report = read_report(folder)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    print_parts(lambda width, live, ascii_only: evaluation(report))


def _evaluation_spec(run: str, folder: RunDir, sets: tuple[str, ...]) -> tuple[JobSpec, Path | None]:
    """The spec of a run with an eval stage, and the folder of its file unless that is the run directory."""
    from hpc_rlhf.launch.auto import load_one
    from hpc_rlhf.spec.load import read_spec
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
        raise unfinished(folder, "there is nothing to evaluate yet", missing, INPUT_WRONG)
    return spec, None if file == folder.job_yaml else file.parent


def _run_stages(
    context: click.Context,
    verb: str,
    words: Sequence[str],
    spec: JobSpec,
    beside: Path | None,
    hostfile: Path | None = None,
    lent: Mapping[str, RunDir] | None = None,
    stages: Sequence[str] | None = None,
) -> RunDir:
    """Run stages of a spec, by default all. If the user interrupts them, show how to resume and end the command.

    Args:
        words: the arguments of the verb, with which it resumes.
    """
    from hpc_rlhf.launch.local.hostfile import read_hostfile
    from hpc_rlhf.launch.local.runner import Interrupted, LocalRun, refuse_live_jobs
    from hpc_rlhf.launch.prepare import claim, prepare
    from hpc_rlhf.observe.terminal.progress import progress

    hosts = read_hostfile(hostfile) if hostfile is not None else None
    stopped: HpcRlhfError | None = None
    with claim(spec, f"hpc-rlhf {verb}") as run:
        refuse_live_jobs(run)
        prepare(spec, run, beside, lent=lent)
        try:
            with progress(run) as watcher:
                LocalRun(spec, run, hosts, watcher, shlex.join(["hpc-rlhf", verb, *words])).run_stages(stages)
        except HpcRlhfError as error:
            stopped = error
    if stopped is None:
        return run
    interrupted = isinstance(stopped, Interrupted)
    if interrupted:  # the user asked for it: no error
        click.echo(str(stopped), err=True)
    if verb == "run":
        from hpc_rlhf.observe.report.page import leave_report

        leave_report(run)
    if interrupted:
        context.exit(stopped.exit_code)
    raise stopped


def _changes(sets: tuple[str, ...]) -> list[str]:
    return [word for change in sets for word in ("--set", change)]
