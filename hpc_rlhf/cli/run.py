"""hpc-rlhf run: run a spec's stages without Slurm."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from hpc_rlhf.cli.options import example, set_option
from hpc_rlhf.errors import HpcRlhfError


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
    stages are not run again.
    """
    from rich.console import Console

    from hpc_rlhf.launch.hostfile import read_hostfile
    from hpc_rlhf.launch.local import LocalRun, refuse_live_jobs
    from hpc_rlhf.launch.prepare import claim, prepare
    from hpc_rlhf.launch.stopping import Interrupted
    from hpc_rlhf.observe.progress import progress
    from hpc_rlhf.observe.report import leave_report
    from hpc_rlhf.observe.summary import print_summary
    from hpc_rlhf.spec.load import load_spec

    spec = load_spec(file, sets)
    hosts = read_hostfile(hostfile) if hostfile is not None else None
    stopped: HpcRlhfError | None = None
    with claim(spec, "hpc-rlhf run") as run:
        refuse_live_jobs(run)
        prepare(spec, run, file.parent)
        try:
            with progress(run) as watcher:
                LocalRun(spec, run, hosts, watcher, _again(file, sets, hostfile)).run_stages()
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
