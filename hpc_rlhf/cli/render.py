"""hpc-rlhf render: write a spec's scripts and configs without submitting them."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, print_overrides, set_option, writing
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.auto import load
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import render
from hpc_rlhf.spec.sweep import Sweep


@click.command(epilog=example("hpc-rlhf render my-job.yaml --out look"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
@set_option
def command(file: Path, out: Path, sets: tuple[str, ...]) -> None:
    """Write the sbatch script, DeepSpeed config and hostfile template of every stage of FILE.

    Templates in a folder `templates` beside FILE override the built-in ones. Each run of a sweep gets its own
    folder in --out.
    """
    spec = load(file, sets)
    print_overrides(file)
    inputs.check(file)
    specs = {out / name: one for name, one in spec.specs.items()} if isinstance(spec, Sweep) else {out: spec}
    with writing(out):
        paths = [path for folder, one in specs.items() for path in render(make_plan(one), folder, inputs.beside(file))]
    click.echo("\n".join(map(str, paths)))
