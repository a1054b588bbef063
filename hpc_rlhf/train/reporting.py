"""What an attempt leaves for the report: which versions it ran with, and, after a stage, the report itself."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

from hpc_rlhf import __version__
from hpc_rlhf.run.layout import RunDir

_TELLING = ("torch", "deepspeed", "transformers", "datasets", "submitit")
_SOURCE = Path(__file__).parents[2]
# Seconds; srun ends a rank that is a minute behind the first, and the stage would have failed.
_ENOUGH = 20.0


def versions() -> dict[str, str]:
    """What this process runs with; the commit where hpc-rlhf runs from a checkout of its own."""
    found = {"hpc-rlhf": __version__, "commit": _commit(), "Python": platform.python_version()}
    for package in _TELLING:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def write_report(run: RunDir) -> None:
    """Write the run's report anew. What goes wrong there is said in the log, and costs the run nothing.

    It is written by a process of its own, which is ended when it takes long: nothing in it can hold or break this one.
    """
    command = [sys.executable, "-m", "hpc_rlhf.cli", "report", str(run.path)]
    try:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=_ENOUGH, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"hpc-rlhf: the report was not written: {error}", file=sys.stderr, flush=True)


def _commit() -> str:
    if not (_SOURCE / ".git").exists():
        return ""
    command = ["git", "-C", str(_SOURCE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
