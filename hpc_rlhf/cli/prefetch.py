"""hpc-rlhf prefetch: bring what a spec needs from the hub into the cache."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.options import example, set_option
from hpc_rlhf.launch.prefetch import prefetch
from hpc_rlhf.spec.hub import cache, items
from hpc_rlhf.spec.sweep import load_any, specs_of


@click.command(epilog=example("hpc-rlhf prefetch my-job.yaml"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
def command(file: Path, sets: tuple[str, ...]) -> None:
    """Bring the hub models and data sets of FILE into the cache.

    Run it where there is a network, such as on a login node, with HF_HOME on a file system that all nodes share. Of a
    model come only the files that loading it takes. Jobs that find everything in the cache do not ask the hub
    (HF_HUB_OFFLINE=1). Called again, it goes on where it stopped, and brings what has changed on the hub. Of a sweep comes what
    any of its runs needs.
    """
    wanted = items(*specs_of(load_any(file, sets)))
    for fetched in prefetch(wanted):
        held = f"{fetched.files} file{'s' * (fetched.files > 1)}, {_size(fetched.size)}"
        click.echo(f"{fetched.item}: {held}{', there already' if fetched.before else ''}")
    done = f"all in {cache()}: jobs with this HF_HOME do not ask the hub"
    click.echo(done if wanted else "the spec takes nothing from the hub", err=True)


def _size(count: int) -> str:
    """Bytes as a person says them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
