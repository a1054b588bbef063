"""hpc-rlhf check: list everything wrong in job specs."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from hpc_rlhf.cli.options import example, json_option, set_option
from hpc_rlhf.cli.table import echo_words
from hpc_rlhf.errors import INPUT_WRONG, Problem, SpecError


@click.command(epilog=example("hpc-rlhf check my-job.yaml --set slurm.nodes=2"))
@click.argument("files", nargs=-1, required=True)
@set_option
@json_option
@click.pass_context
def command(ctx: click.Context, files: tuple[str, ...], sets: tuple[str, ...], as_json: bool) -> None:
    """Check job specs and list everything wrong in them.

    Each problem is a line FILE:LINE:COLUMN: FIELD: WHAT (HINT). Ends with 2 when there is one. Of a sweep, every run is
    checked.
    """
    checked = {file: _check(file, sets) for file in files}
    problems = {file: found for file, (found, _) in checked.items()}
    bad = sum(1 for found in problems.values() if found)
    if as_json:
        click.echo(
            json.dumps({file: [asdict(one) for one in found] for file, found in problems.items()}, indent=2)
        )
    else:
        for file, (found, words) in checked.items():
            for line in map(str, found) if found else [f"{file}: {words}"]:
                echo_words(line, err=False)
    if bad:
        click.echo(f"{bad} of {len(problems)} spec{'s' * (len(problems) > 1)} cannot run", err=True)
        ctx.exit(INPUT_WRONG)


def _check(file: str, sets: tuple[str, ...]) -> tuple[tuple[Problem, ...], str]:
    """What is wrong with a spec, and what is said of one with which nothing is."""
    from hpc_rlhf.launch.auto import load
    from hpc_rlhf.spec.sweep import Sweep

    try:
        spec = load(file, sets)
    except SpecError as error:
        return error.problems, ""
    return (), f"ok, {spec.told}" if isinstance(spec, Sweep) else "ok"
