"""hpc-rlhf check: list every error in job specs."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from hpc_rlhf.cli.arguments import example, json_option, set_option
from hpc_rlhf.cli.console import print_wrapped
from hpc_rlhf.errors import INPUT_WRONG, Problem, SpecError
from hpc_rlhf.spec.sweep import Sweep, load_any, specs_of


@click.command(epilog=example("hpc-rlhf check my-job.yaml --set slurm.nodes=2"))
@click.argument("files", nargs=-1, required=True)
@set_option
@json_option
@click.pass_context
def command(ctx: click.Context, files: tuple[str, ...], sets: tuple[str, ...], as_json: bool) -> None:
    """Check job specs and list every error.

    Each error is one line, FILE:LINE:COLUMN: FIELD: ERROR (HINT). The exit code is 2 if there are any. All
    runs of a sweep are checked.
    """
    checked = {file: _check(file, sets) for file in files}
    if as_json:
        facts = {file: [asdict(problem) for problem in problems] for file, (problems, _) in checked.items()}
        click.echo(json.dumps(facts, indent=2))
    else:
        for file, (problems, verdict) in checked.items():
            for line in map(str, problems) if problems else [f"{file}: {verdict}"]:
                print_wrapped(line, err=False)
    bad = sum(1 for problems, _ in checked.values() if problems)
    if bad:
        click.echo(f"{bad} of {len(checked)} spec{'s' * (len(checked) > 1)} cannot run", err=True)
        ctx.exit(INPUT_WRONG)


def _check(file: str, sets: tuple[str, ...]) -> tuple[tuple[Problem, ...], str]:
    """The errors of a spec, and the verdict if there are none."""
    try:
        spec = load_any(file, sets)
        if any(one.autos for one in specs_of(spec)):
            from hpc_rlhf.launch.auto import load  # estimates are slow to import

            spec = load(file, sets)
    except SpecError as error:
        return error.problems, ""
    return (), f"ok, {spec.summary}" if isinstance(spec, Sweep) else "ok"
