"""hpc-rlhf run: run a spec's stages without Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, set_option
from hpc_rlhf.cli.console import print_parts
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec


@click.command(
    "run", epilog=example("hpc-rlhf run jobs/tiny.yaml", "hpc-rlhf run my-job.yaml --hostfile hostfiles/lab.hostfile")
)
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="Run on the machines in this file through DeepSpeed's launcher, not only on this one.",
)
@click.pass_context
def command(context: click.Context, file: Path, sets: tuple[str, ...], hostfile: Path | None) -> None:
    """Run a spec's stages on this machine, without Slurm.

    All ranks that the spec asks for start here. Ctrl-C saves and stops; the same command resumes. Finished
    stages are skipped. The runs of a sweep run one after the other.
    """
    from hpc_rlhf.cli.plan_tables import print_choice
    from hpc_rlhf.launch.auto import load
    from hpc_rlhf.launch.sweep import lay_out
    from hpc_rlhf.spec.sweep import Sweep

    spec = load(file, sets, print_choice)
    again = _again(file, sets, hostfile)
    if not isinstance(spec, Sweep):
        _run(context, spec, file.parent, hostfile, again, {})
        return
    lent = lay_out(spec)
    for number, member in enumerate(spec.members, 1):
        click.echo(f"run {number} of {len(spec.members)}: {member.name}", err=True)
        _run(context, member.spec, file.parent, hostfile, again, lent[member.name])


def _run(
    context: click.Context, spec: JobSpec, beside: Path, hostfile: Path | None, again: str,
    lent: Mapping[str, RunDir],
) -> None:  # fmt: skip
    from hpc_rlhf.launch.local.hostfile import read_hostfile
    from hpc_rlhf.launch.local.runner import Interrupted, LocalRun, refuse_live_jobs
    from hpc_rlhf.launch.prepare import claim, prepare
    from hpc_rlhf.observe.report import leave_report
    from hpc_rlhf.observe.terminal.progress import progress
    from hpc_rlhf.observe.terminal.results import summary

    hosts = read_hostfile(hostfile) if hostfile is not None else None
    stopped: HpcRlhfError | None = None
    with claim(spec, "hpc-rlhf run") as run:
        refuse_live_jobs(run)
        prepare(spec, run, beside, lent=lent)
        try:
            with progress(run) as watcher:
                LocalRun(spec, run, hosts, watcher, again).run_stages()
        except HpcRlhfError as error:
            stopped = error
    if isinstance(stopped, Interrupted):  # the user asked for it: no error
        click.echo(str(stopped), err=True)
        leave_report(run)
        context.exit(stopped.exit_code)
    if stopped is not None:
        leave_report(run)
        raise stopped
    print_parts(lambda width, live, ascii_only: summary(run, width))


def _again(file: Path, sets: tuple[str, ...], hostfile: Path | None) -> str:
    """The command that resumes this run."""
    words = ["hpc-rlhf", "run", str(file)]
    for change in sets:
        words += ["--set", change]
    return shlex.join(words if hostfile is None else [*words, "--hostfile", str(hostfile)])
