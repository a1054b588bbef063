"""hpc-rlhf run: run a spec's stages without Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import click

from hpc_rlhf.cli.choice import echo_choice
from hpc_rlhf.cli.options import example, set_option
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec


@click.command(
    "run",
    epilog=example(
        "hpc-rlhf run jobs/tiny.yaml", "hpc-rlhf run my-job.yaml --hostfile hostfiles/lab.hostfile"
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="Run over the machines of this file through DeepSpeed's launcher, instead of on this machine alone.",
)
@click.pass_context
def command(context: click.Context, file: Path, sets: tuple[str, ...], hostfile: Path | None) -> None:
    """Run a spec's stages on this machine, without Slurm.

    As many ranks start as the spec asks for, all of them here. Ctrl-C saves; the same command goes on. Finished
    stages are not run again. The runs of a sweep come one after the other.
    """
    from hpc_rlhf.launch.auto import load
    from hpc_rlhf.launch.sweep import lay_out
    from hpc_rlhf.spec.sweep import Sweep

    spec = load(file, sets, echo_choice)
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
    from rich.console import Console

    from hpc_rlhf.launch.local.hostfile import read_hostfile
    from hpc_rlhf.launch.local.interrupts import Interrupted
    from hpc_rlhf.launch.local.runner import LocalRun, refuse_live_jobs
    from hpc_rlhf.launch.prepare import claim, prepare
    from hpc_rlhf.observe.report import leave_report
    from hpc_rlhf.observe.summary import print_summary
    from hpc_rlhf.observe.terminal.progress import progress

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
    if isinstance(stopped, Interrupted):  # asked for, so no error
        click.echo(str(stopped), err=True)
        leave_report(run)
        context.exit(stopped.exit_code)
    if stopped is not None:
        leave_report(run)
        raise stopped
    print_summary(run, Console(highlight=False))


def _again(file: Path, sets: tuple[str, ...], hostfile: Path | None) -> str:
    words = ["hpc-rlhf", "run", str(file)]
    for change in sets:
        words += ["--set", change]
    return shlex.join(words if hostfile is None else [*words, "--hostfile", str(hostfile)])
