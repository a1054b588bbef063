"""hpc-rlhf doctor: check what a run needs, before it is submitted."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from hpc_rlhf.cli.options import example, json_option, set_option
from hpc_rlhf.errors import RUN_FAILED
from hpc_rlhf.launch.auto import load
from hpc_rlhf.launch.doctor import examine
from hpc_rlhf.launch.doctor.finding import Finding
from hpc_rlhf.spec.sweep import Sweep, specs_of

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command(epilog=example("hpc-rlhf doctor my-job.yaml --on-cluster"))
@click.argument("file", type=click.Path(path_type=Path), required=False)
@set_option
@click.option(
    "--on-cluster", is_flag=True, help="Look at the nodes too, in a job of about a minute on two of them."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context, file: Path | None, sets: tuple[str, ...], on_cluster: bool, as_json: bool
) -> None:
    """Check what a run of FILE needs, or without FILE what any run does.

    Each line says ok, warning or error, what was looked at, where, what was found and, below, what to do about it. Looked
    at are: Python and packages, torch and DeepSpeed, Slurm's settings, the hub, whether the stages fit the GPUs that
    slurm.gpu tells, and the run directory. Ends with 1 when there is an error. Of a sweep, what any run takes from the hub
    is looked for, and else what its first run needs.

    --json prints the list `findings`, each with check, level, said, cure and where, and the counts `errors` and `warnings`.
    """
    spec = load(file, sets) if file is not None else None
    specs = specs_of(spec) if spec is not None else ()
    if isinstance(spec, Sweep):
        click.echo(f"{spec.told}; {spec.members[0].name} is looked at", err=True)
    beside = file.parent if file is not None else None
    findings = examine(specs, beside, on_cluster, lambda words: click.echo(words, err=True))
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    if as_json:
        answer = {"findings": list(map(asdict, findings)), "errors": errors, "warnings": warnings}
        click.echo(json.dumps(answer, indent=1, ensure_ascii=False))
    else:
        _echo(findings)
        click.echo(_sum(errors, warnings), err=True)
    if errors:
        ctx.exit(RUN_FAILED)


def _sum(errors: int, warnings: int) -> str:
    if not errors and not warnings:
        return "\nall is well"
    counts = [(errors, "error"), (warnings, "warning")]
    return "\n" + " and ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts if count)


def _echo(findings: Sequence[Finding]) -> None:
    """A block for each place, its findings in columns; long ones folded where a terminal is too narrow."""
    on_terminal = sys.stdout.isatty()
    colour = on_terminal and "NO_COLOR" not in os.environ
    names = max(len(finding.check) for finding in findings)
    indent = " " * (13 + names)
    width = max(shutil.get_terminal_size().columns - len(indent), 30) if on_terminal else 10**6
    for number, where in enumerate(dict.fromkeys(finding.where for finding in findings)):
        click.echo(f"{chr(10) * (number > 0)}{where}")
        for finding in (each for each in findings if each.where == where):
            level = finding.level.ljust(7)
            level = click.style(level, fg=_COLOURS[finding.level]) if colour else level
            said = textwrap.wrap(finding.said, width)
            cure = textwrap.wrap(finding.cure, width, initial_indent="-> ", subsequent_indent="   ")
            first, *more = [*said, *cure]
            click.echo(f"  {level}  {finding.check.ljust(names)}  {first}")
            for line in more:
                click.echo(f"{indent}{line}")
