"""hpc-rlhf version: print the versions of hpc-rlhf and of what it uses."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import click

from hpc_rlhf import __version__
from hpc_rlhf.cli.arguments import example, json_option
from hpc_rlhf.cli.console import print_json
from hpc_rlhf.errors import HpcRlhfError

# Optional ones last.
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "vllm", "wandb", "mlflow-skinny")


@click.command(epilog=example("hpc-rlhf version"))
@json_option
def command(as_json: bool) -> None:
    """Print the versions of hpc-rlhf, Python, the packages that train, and Slurm, for a bug report.

    In --json, the version of something that is not installed here is null.
    """
    own = {"hpc-rlhf": __version__, "Python": platform.python_version()}
    versions = {**own, **{name: _installed(name) for name in _PACKAGES}, "Slurm": _slurm()}
    if as_json:
        print_json({**versions, "executable": sys.executable})
        return
    width = max(map(len, versions))
    for name, version in versions.items():
        if version is not None:
            click.echo(f"{name:<{width}}  {version}")


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _slurm() -> str | None:
    from hpc_rlhf.slurm import commands

    try:
        return commands.execute(["sbatch", "--version"], 3).stdout.split()[-1]
    except (HpcRlhfError, IndexError):
        return None
