"""hpc-rlhf data: show what a spec's data sources yield."""

from __future__ import annotations

import sys

import click

from hpc_rlhf.cli.arguments import example, json_option, set_option
from hpc_rlhf.cli.colours import shows_colours
from hpc_rlhf.cli.console import print_json, print_parts, print_wrapped
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.auto import load_one
from hpc_rlhf.launch.survey import preview
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.stages import Data, kind_of


@click.command(epilog=example("hpc-rlhf data my-job.yaml --stage sft --rows 3"))
@click.argument("file")
@click.option("--stage", help="Show the data of this stage only.")
@click.option(
    "--rows", type=click.IntRange(min=0), default=1, show_default=True, help="Rows of each source to show as text."
)
@set_option
@json_option
def command(file: str, stage: str | None, rows: int, sets: tuple[str, ...], as_json: bool) -> None:
    """Show what the data sources of FILE yield in each stage.

    Reads and tokenizes all data as the stages do, which takes minutes for a gigabyte, and keeps nothing. For
    each source it shows how many rows and tokens a stage trains on and holds out, why the other rows are
    left out, how long the sequences are, and the first rows as the model sees them. What the stage learns is
    in colour, or else in [brackets]: the responses in SFT and DPO, all but the first token of a document in
    pretraining, and for the reward model the tokens whose scores are compared. PPO and GRPO learn from
    responses that they generate.

    In pretraining a row is a document, and the rows shown are packed sequences.

    --json prints `notes`, and as `data` the list of sources for each stage, or field that names a source. A
    source has `outcomes`, what became of its rows; `splits`, the rows and tokens of train and held_out;
    `lengths`, a histogram of its sequences; and `shown`, whose sequences consist of `parts` with text and
    learned.
    """
    spec = load_one(file, sets)
    facts = preview(spec, _stages(spec, stage), rows)
    if as_json:
        print_json(facts)
        return
    from hpc_rlhf.observe.terminal.preview import draw

    colours = shows_colours(sys.stdout)
    print_parts(lambda width, live, ascii_only: draw(facts["data"], width, ascii_only, colours))
    for note in facts["notes"]:
        print_wrapped(f"warning: {note}", err=True)


def _stages(spec: JobSpec, stage: str | None) -> list[str]:
    """The stages whose data is shown.

    Raises:
        HpcRlhfError: ``stage`` is none of them.
    """
    stages = [name for name in spec.stage_names if kind_of(name).data is not Data.NONE]
    if stage is None:
        return stages
    if stage not in stages:
        there = stage in spec.stage_names
        what = f"the stage {stage} has no data of its own" if there else f"the spec has no stage {stage}"
        raise HpcRlhfError(what, where="--stage", hint=f"choose one of {', '.join(stages)}")
    return [stage]
