"""hpc-rlhf schema: print the JSON Schema of a job spec."""

from __future__ import annotations

import json

import click

from hpc_rlhf.cli.arguments import example
from hpc_rlhf.spec.job import json_schema


@click.command(epilog=example("hpc-rlhf schema > hpc-rlhf.schema.json"))
def command() -> None:
    """Print the JSON Schema of a job spec, for editors.

    Save it and put `# yaml-language-server: $schema=PATH` at the top of a spec. An editor with the YAML
    language server then completes fields, shows their descriptions and marks errors.
    """
    click.echo(json.dumps(json_schema(), indent=2))
