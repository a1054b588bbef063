"""The option --reuse: take finished stages from another run."""

from __future__ import annotations

from collections.abc import Mapping

import click

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import reuse
from hpc_rlhf.launch.sweep import shared
from hpc_rlhf.observe.find import find_runs
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep

reuse_option = click.option(
    "--reuse", "other", metavar="RUN", help="Take finished stages from another run, if their inputs are unchanged."
)


def find_reused(spec: JobSpec | Sweep, other: str | None) -> dict[str, Mapping[str, RunDir]]:
    """The stages that each run of a spec takes from another, by the run's name in a sweep, or "". Shows on stderr which
    stages are taken, and why the others are not.

    Raises:
        HpcRlhfError: there is no such run, or nothing can be taken from it.
    """
    if other is None:
        return {}
    is_sweep = isinstance(spec, Sweep)
    if isinstance(spec, Sweep) and spec.search is not None:
        hint = "set models to the finished ones and leave out their stages, or leave out --reuse"
        raise HpcRlhfError("a search cannot take stages of another run", where="--reuse", hint=hint)
    specs, lent = (spec.specs, shared(spec)) if isinstance(spec, Sweep) else ({"": spec}, {})
    reused = reuse.find(specs, find_runs(other), lent)
    for name, stages in reused.items():
        for each in stages:
            words = f"reused from {each.source.path}" if each.source else f"not reused: {each.why}"
            click.echo(printable(f"{name + ', ' if is_sweep else ''}{each.stage}: {words}"), err=True)
    return {name: {each.stage: each.source for each in stages if each.source} for name, stages in reused.items()}
