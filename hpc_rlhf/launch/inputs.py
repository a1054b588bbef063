"""The files besides a job file that decide what its jobs run: those that it extends, and templates beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from hpc_rlhf import trust
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import ownership
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec import layers
from hpc_rlhf.spec.yaml_source import STDIN

_HINT = "use a copy in a folder of your own"


class Template(NamedTuple):
    """A user's template, as it was when it was checked."""

    path: Path
    content: bytes


def beside(file: Path) -> Path | None:
    """The folder whose ``templates/`` belongs to a job file; None for standard input."""
    return None if file == STDIN else file.parent


def templates(folder: Path) -> dict[str, Template]:
    """The templates in a folder's ``templates/`` by name, as in ``{% include "…" %}``.

    Raises:
        HpcRlhfError: one cannot be read, or somebody else could change it.
    """
    top = folder / "templates"
    if not os.path.lexists(top):
        return {}
    run = RunDir(folder.parent)  # if these are its copies: a group may write above a shared run
    shared = folder == run.scripts and ownership.is_shared(run)
    trust.check([top], _HINT, shared)
    closed = not folder.stat().st_mode & 0o011  # nobody else can enter, as in a run's folder, whatever the modes in it
    texts = {}
    try:
        for inside, _, files in os.walk(top, onerror=_refuse_to_skip):
            for path in sorted(Path(inside, name) for name in files if name.endswith(".j2")):
                if path.is_file():
                    texts[path.relative_to(top).as_posix()] = _read(path, closed, shared)
    except OSError as error:
        raise HpcRlhfError(f"cannot be read: {error.strerror}", where=str(error.filename or top)) from error
    return texts


def overrides(file: Path) -> dict[Path, str]:
    """These files, and the effect of each. The job file must have been loaded before. Raises as ``templates`` does."""
    extended = dict.fromkeys(layers.files(file)[1:], "extended by the job file")
    folder = beside(file)
    own = [] if folder is None else [each.path for each in templates(folder).values()]
    return {**extended, **dict.fromkeys(own, "replaces a built-in template, or is included by one")}


def check(file: Path) -> None:
    """Raise HpcRlhfError if somebody else could change a job file, what it extends or the templates beside it: their
    lines run as this user."""
    trust.check([*([] if file == STDIN else [file]), *overrides(file)], _HINT)


def _read(path: Path, closed: bool, shared: bool) -> Template:
    """Read a template. The file is checked once it is open: before that, its name could come to lead elsewhere."""
    if not closed:
        trust.check([path], _HINT, shared)
    with path.open("rb") as file:
        trust.check_facts(path, os.fstat(file.fileno()), _HINT, group_may_write=closed)
        return Template(path, file.read())


def _refuse_to_skip(error: OSError) -> None:
    if not isinstance(error, NotADirectoryError):
        raise error
