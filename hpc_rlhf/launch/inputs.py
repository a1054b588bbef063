"""The files besides a job file that decide what its jobs run: those that it extends, and templates beside it."""

from __future__ import annotations

from pathlib import Path

from hpc_rlhf import trust
from hpc_rlhf.spec import layers
from hpc_rlhf.spec.yaml_source import STDIN

_HINT = "use a copy in a folder of your own"


def overrides(file: Path) -> dict[Path, str]:
    """Those files, with what each does. The job file must have been loaded before."""
    extended = dict.fromkeys(layers.files(file)[1:], "extended by the job file")
    templates = sorted((file.parent / "templates").rglob("*.j2"))
    return {**extended, **dict.fromkeys(templates, "replaces a built-in template, or is included by one")}


def check(file: Path) -> None:
    """Raise HpcRlhfError if somebody else could change a job file, what it extends or the templates beside it: their
    lines run as this user."""
    trust.check([*([] if file == STDIN else [file]), *overrides(file)], _HINT)
