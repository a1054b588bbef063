"""hpc-rlhf prefetch: download a spec's models and data sets into the hub cache."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, set_option
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.parameters import architecture
from hpc_rlhf.launch.prefetch import prefetch
from hpc_rlhf.run.format import size
from hpc_rlhf.spec.hub import cache, items
from hpc_rlhf.spec.sweep import load_any, specs_of


@click.command(epilog=example("hpc-rlhf prefetch my-job.yaml"))
@click.argument("file", type=click.Path(path_type=Path))
@set_option
def command(file: Path, sets: tuple[str, ...]) -> None:
    """Download the hub models and data sets of FILE into the cache.

    Run it where there is a network, such as on a login node, with HF_HOME on a file system that all nodes
    share. Of a model, only the files needed to load it are downloaded. Jobs that find everything in the cache
    do not contact the hub (HF_HUB_OFFLINE=1). Run it again to resume a download and to fetch updates. For a
    sweep, it downloads everything that any run needs.
    """
    specs = specs_of(load_any(file, sets))
    required = items(*specs)
    for fetched in prefetch(required):
        files = f"{fetched.files} file{'s' * (fetched.files > 1)}, {size(fetched.size)}"
        click.echo(f"{fetched.item}: {files}{', already in the cache' if fetched.before else ''}")
    for spec in specs:
        with suppress(HpcRlhfError):  # `plan` reports it
            architecture(spec.models, "actor")  # kept for `plan`, which is then quick
    done = f"everything is in {cache()}: jobs with this HF_HOME do not contact the hub"
    click.echo(done if required else "the spec needs nothing from the hub", err=True)
