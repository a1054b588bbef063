"""hpc-rlhf doctor: check the requirements of a run before it is submitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.arguments import example, json_option, set_option
from hpc_rlhf.cli.console import print_json, print_parts
from hpc_rlhf.errors import RUN_FAILED
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.auto import load
from hpc_rlhf.launch.doctor import examine
from hpc_rlhf.launch.doctor.finding import Finding
from hpc_rlhf.spec.sweep import Sweep, specs_of

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.command(epilog=example("hpc-rlhf doctor my-job.yaml --on-cluster"))
@click.argument("file", type=click.Path(path_type=Path), required=False)
@set_option
@click.option("--on-cluster", is_flag=True, help="Also check compute nodes, in a job of about a minute on two of them.")
@json_option
@click.pass_context
def command(ctx: click.Context, file: Path | None, sets: tuple[str, ...], on_cluster: bool, as_json: bool) -> None:
    """Check that this machine and the cluster can run FILE; without FILE, only what every run needs.

    The checks cover Python and packages, torch and DeepSpeed, the sandbox of code rewards, Slurm's settings,
    the hub, whether the stages fit the GPUs that slurm.gpu names, and the run directory. Each line has a
    level (ok, warning or error), the check, the finding and, below it, the fix. The exit code is 1 if there
    is an error. For a sweep, the hub is checked for all runs, everything else for the first.

    --json prints the list `findings`, each with check, level, message, fix and where, and the counts
    `errors` and `warnings`.
    """
    spec = None if file is None else load(file, sets)
    if isinstance(spec, Sweep):
        click.echo(f"{spec.summary}; checking {spec.members[0].name}", err=True)
    specs = () if spec is None else specs_of(spec)
    beside = None if file is None else inputs.beside(file)
    if file is not None:
        inputs.check(file)
    findings = examine(specs, beside, on_cluster, lambda words: click.echo(words, err=True))
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    if as_json:
        print_json({"findings": list(map(asdict, findings)), "errors": errors, "warnings": warnings})
    else:
        print_parts(lambda width, live, ascii_only: _blocks(findings))
        counts = [(errors, "error"), (warnings, "warning")]
        words = " and ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts if count)
        click.echo(f"\n{words or 'no problems found'}", err=True)
    if errors:
        ctx.exit(RUN_FAILED)


def _blocks(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """The findings of each place, under its name."""
    from rich.padding import Padding
    from rich.text import Text

    from hpc_rlhf.observe.terminal.tables import grid, styled

    longest = max((len(finding.check) for finding in findings), default=0)
    for number, where in enumerate(dict.fromkeys(finding.where for finding in findings)):
        yield Text(f"{chr(10) * (number > 0)}{where}")
        table = grid("", "", "")
        for column, width in zip(table.columns, (len("warning"), longest), strict=False):
            column.min_width, column.no_wrap = width, True
        for finding in (each for each in findings if each.where == where):
            table.add_row(styled(finding.level), finding.check, finding.message)
            if finding.fix:
                table.add_row("", "", f"-> {finding.fix}")
        yield Padding(table, (0, 0, 0, 2))
