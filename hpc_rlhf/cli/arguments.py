"""Arguments and options that several verbs share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import acting
from hpc_rlhf.run.layout import RunDir, SweepDir

set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a field of the spec, such as stages.ppo.epochs=2. Repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def example(*commands: str) -> str:
    """The epilog of a verb's help: commands that work."""
    title = "Example:" if len(commands) == 1 else "Examples:"
    return "\n".join(("\b", title, *(f"  {line}" for line in commands)))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a failed write to the user's --out into an HpcRlhfError."""
    try:
        yield
    except FileExistsError as error:
        raise HpcRlhfError(
            "the file already exists", where=str(error.filename), hint="choose another with --out, or remove it"
        ) from error
    except OSError as error:
        raise HpcRlhfError(f"cannot write: {error.strerror}", where=str(error.filename or out)) from error


def unfinished(run: RunDir, what: str, missing: Sequence[str], exit_code: int) -> HpcRlhfError:
    """The error that a verb lacks models which the run has not finished."""
    return HpcRlhfError(
        f"{what}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not finished",
        where=str(run.path),
        hint=f"to see the progress: hpc-rlhf status {shlex.quote(str(run.path))}",
        exit_code=exit_code,
    )


def find_run(argument: str) -> RunDir:
    """The run directory that RUN refers to: the directory itself, or a job file's only run.

    Raises:
        HpcRlhfError: there is none, or RUN is a sweep of several runs.
    """
    runs = find_runs(argument)
    if len(runs) > 1:
        names = [str(run.path) for run in runs]
        shown = names if len(names) <= 3 else [*names[:3], "…"]
        raise HpcRlhfError(
            f"is a sweep of {len(runs)} runs, but this verb takes one run",
            where=argument,
            hint=f"choose one: {', '.join(shown)}",
        )
    return runs[0]


def find_runs(argument: str) -> list[RunDir]:
    """The run directories that RUN refers to: at least one, and all of them if it is a sweep.

    Raises:
        HpcRlhfError: there is none.
    """
    path = Path(argument)
    members: list[RunDir] = []
    if (own := acting.run_of(path)) is not None:
        path = own.path
    elif path.is_file():
        from hpc_rlhf.spec.sweep import Sweep, load_any

        spec = load_any(path)
        path = spec.run_dir if isinstance(spec, Sweep) else Path(spec.run_dir)
        if isinstance(spec, Sweep):
            members = [SweepDir(path.absolute()).run(member.name) for member in spec.members]
    elif not RunDir(path).job_yaml.is_file():
        members = _recorded_members(SweepDir(path.absolute()))
    runs = [run for run in members or [RunDir(path.absolute())] if run.job_yaml.is_file()]
    if not runs:
        raise HpcRlhfError(
            "is not a run directory: it has no job.yaml" if path.is_dir() else "does not exist",
            where=str(path),
            hint="give the run_dir of a run that was started with submit or run, or its job file",
        )
    return runs


def _recorded_members(sweep: SweepDir) -> list[RunDir]:
    """The runs recorded in a sweep's folder; empty when it is not a sweep's folder."""
    try:
        return [sweep.run(name) for name in json.loads(sweep.json.read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []
