"""hpc-rlhf export: write a trained model as one file for another program."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, run_argument, writing
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.models import intact_model
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import POLICIES


@click.command(epilog=example("hpc-rlhf export my-job.yaml", "hpc-rlhf export my-job.yaml --stage sft -o sft.gguf"))
@run_argument
@click.option("--format", type=click.Choice(("gguf",)), default="gguf", show_default=True, expose_value=False)
@click.option(
    "--stage", type=click.Choice(tuple(POLICIES)), help="Model to export.", show_default="the latest finished"
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.",
    show_default="NAME-STAGE.gguf in this folder",
)
def command(run: str, stage: str | None, out: Path | None) -> None:
    """Write a finished model of RUN, a run directory or job file, as a GGUF file for llama.cpp and programs that build
    on it, with its tokenizer and chat template, and print its path.

    Llama, Qwen2 and Qwen3 models with byte-level BPE tokenizers can be exported, in the precision of their weights.
    What is not known to come out the same is refused.
    """
    if not find_spec("gguf"):
        raise HpcRlhfError("export needs gguf", hint="pip install 'hpc-rlhf[gguf]'")
    run_dir = find_run(run)
    name, folder = intact_model(run_dir, stage)
    title = f"{read_spec(run_dir.job_yaml).name}-{name}"
    out = out or Path(f"{title}.gguf")
    if out.exists():
        raise HpcRlhfError("the file already exists", where=str(out), hint="choose another with --out, or remove it")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from hpc_rlhf.train.models.gguf.file import write_gguf

    partial = out.with_name(f"{out.name}.partial")
    try:
        with writing(out):
            write_gguf(folder, partial, title)
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    click.echo(out)
