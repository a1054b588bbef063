"""hpc-rlhf run: run a spec's stages without Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, print_overrides, set_option
from hpc_rlhf.cli.console import print_parts, print_wrapped
from hpc_rlhf.cli.plan_tables import print_choice
from hpc_rlhf.cli.reuse import find_reused, reuse_option
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.auto import load
from hpc_rlhf.launch.changes import refuse_changes
from hpc_rlhf.launch.local.hostfile import read_hostfile
from hpc_rlhf.launch.preflight import objections, sentence
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.launch.search import run_trials
from hpc_rlhf.launch.sweep import lay_out
from hpc_rlhf.observe.compare import measure
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.trials import describe
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep


@click.command(
    epilog=example("hpc-rlhf run jobs/tiny.yaml", "hpc-rlhf run my-job.yaml --hostfile hostfiles/lab.hostfile")
)
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@reuse_option
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="Run on the machines in this file through DeepSpeed's launcher, not only on this one.",
)
@click.pass_context
def command(
    context: click.Context, file: Path, sets: tuple[str, ...], other: str | None, hostfile: Path | None
) -> None:
    """Run a spec's stages on this machine, without Slurm.

    All ranks that the spec asks for start here. Ctrl-C saves and stops; the same command resumes. Finished
    stages are skipped. The runs of a sweep run one after the other. --reuse is as for submit.
    """
    from hpc_rlhf.observe.terminal.results import summary

    def run_one(name: str, spec: JobSpec, lent: Mapping[str, RunDir]) -> None:
        words = [str(file), *set_arguments(sets), *(["--reuse", other] if other else [])]
        if hostfile is not None:
            words += ["--hostfile", str(hostfile)]
        run = run_stages(context, "run", words, spec, inputs.beside(file), hostfile, lent, reused=reused.get(name))
        print_parts(lambda width, live, ascii_only: summary(run, width))

    spec = load(file, sets, print_choice)
    print_overrides(file)
    inputs.check(file)
    reused = find_reused(spec, other)
    for each in objections(spec, reused):
        print_wrapped(f"warning: {sentence(each)}")
    if not isinstance(spec, Sweep):
        run_one("", spec, {})
        return
    if spec.search is not None:
        trials = run_trials(
            spec,
            partial(measure, metric=spec.search.metric),
            lambda trial, one, lent: run_one(trial.name, one, lent),
            lambda text: click.echo(printable(text), err=True),
        )
        click.echo(describe(trials), err=True)
        return
    lent = lay_out(spec)
    for number, member in enumerate(spec.members, 1):
        click.echo(f"run {number} of {len(spec.members)}: {member.name}", err=True)
        run_one(member.name, member.spec, lent[member.name])


def run_stages(
    context: click.Context, verb: str, words: Sequence[str], spec: JobSpec, beside: Path | None,
    hostfile: Path | None = None, lent: Mapping[str, RunDir] | None = None, stages: Sequence[str] | None = None,
    reused: Mapping[str, RunDir] | None = None,
) -> RunDir:  # fmt: skip
    """Run stages of a spec, by default all. If the user interrupts them, show how to resume and end the command.

    If ``hpc-rlhf run`` ends early, the report is written, too.

    Args:
        words: the arguments of the verb, with which it resumes.

    Raises:
        HpcRlhfError: a stage failed.
    """
    from hpc_rlhf.launch.local.runner import Interrupted, LocalRun, refuse_live_jobs
    from hpc_rlhf.observe.terminal.progress import progress

    hosts = read_hostfile(hostfile) if hostfile is not None else None
    stopped: HpcRlhfError | None = None
    with claim(spec, f"hpc-rlhf {verb}") as run:
        refuse_changes(run, spec, live=False)  # first: it would be refused without those jobs, too
        refuse_live_jobs(run)
        prepare(spec, run, beside, lent=lent, reused=reused)
        try:
            with progress(run) as watcher:
                LocalRun(spec, run, hosts, watcher, shlex.join(["hpc-rlhf", verb, *words])).run_stages(stages)
        except HpcRlhfError as error:
            stopped = error
    if stopped is None:
        return run
    interrupted = isinstance(stopped, Interrupted)
    if interrupted:  # the user asked for it: no error
        click.echo(printable(str(stopped)), err=True)
    if verb == "run":
        from hpc_rlhf.observe.report.page import leave_report

        leave_report(run)
    if interrupted:
        context.exit(stopped.exit_code)
    raise stopped


def set_arguments(sets: tuple[str, ...]) -> list[str]:
    """The arguments that repeat the command's --set options."""
    return [word for change in sets for word in ("--set", change)]
