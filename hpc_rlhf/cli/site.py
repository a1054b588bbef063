"""Verbs that prepare a site for a spec: doctor, prefetch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf.cli.arguments import example, json_option, set_option
from hpc_rlhf.cli.console import print_json, print_parts
from hpc_rlhf.errors import RUN_FAILED
from hpc_rlhf.launch.doctor.finding import Finding
from hpc_rlhf.spec.sweep import Sweep, load_any, specs_of

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.command(epilog=example("hpc-rlhf doctor my-job.yaml --on-cluster"))
@click.argument("file", type=click.Path(path_type=Path), required=False)
@set_option
@click.option("--on-cluster", is_flag=True, help="Also check compute nodes, in a job of about a minute on two of them.")
@json_option
@click.pass_context
def doctor_command(
    ctx: click.Context, file: Path | None, sets: tuple[str, ...], on_cluster: bool, as_json: bool
) -> None:
    """Check that this machine and the cluster can run FILE; without FILE, only what every run needs.

    The checks cover Python and packages, torch and DeepSpeed, Slurm's settings, the hub, whether the stages
    fit the GPUs that slurm.gpu names, and the run directory. Each line has a level (ok, warning or error),
    the check, the finding and, below it, the fix. The exit code is 1 if there is an error. For a sweep, the
    hub is checked for all runs, everything else for the first.

    --json prints the list `findings`, each with check, level, message, fix and where, and the counts
    `errors` and `warnings`.
    """
    from hpc_rlhf.launch.auto import load
    from hpc_rlhf.launch.doctor import examine

    spec = None if file is None else load(file, sets)
    if isinstance(spec, Sweep):
        click.echo(f"{spec.summary}; checking {spec.members[0].name}", err=True)
    specs = () if spec is None else specs_of(spec)
    beside = None if file is None else file.parent
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


@click.command(epilog=example("hpc-rlhf prefetch my-job.yaml"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
def prefetch_command(file: Path, sets: tuple[str, ...]) -> None:
    """Download the hub models and data sets of FILE into the cache.

    Run it where there is a network, such as on a login node, with HF_HOME on a file system that all nodes
    share. Of a model, only the files needed to load it are downloaded. Jobs that find everything in the cache
    do not contact the hub (HF_HUB_OFFLINE=1). Run it again to resume a download and to fetch updates. For a
    sweep, it downloads everything that any run needs.
    """
    from hpc_rlhf.launch.prefetch import prefetch
    from hpc_rlhf.spec.hub import cache, items

    required = items(*specs_of(load_any(file, sets)))
    for fetched in prefetch(required):
        size = f"{fetched.files} file{'s' * (fetched.files > 1)}, {_size(fetched.size)}"
        click.echo(f"{fetched.item}: {size}{', already in the cache' if fetched.before else ''}")
    done = f"everything is in {cache()}: jobs with this HF_HOME do not contact the hub"
    click.echo(done if required else "the spec needs nothing from the hub", err=True)


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
