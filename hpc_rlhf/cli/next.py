"""hpc-rlhf next: write the spec of a run's next round."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, run_argument, write_new
from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.models import unfinished
from hpc_rlhf.observe.next_round import next_round
from hpc_rlhf.run import acting, manifest
from hpc_rlhf.spec.commented import commented
from hpc_rlhf.spec.load import check_tree, read_spec
from hpc_rlhf.spec.yaml_source import Mark, parse_yaml


@click.command(epilog=example("hpc-rlhf next my-job.yaml", "hpc-rlhf next runs/my-run --out second.yaml"))
@run_argument
@click.option("-o", "--out", metavar="FILE", help="File to write, - for stdout.", show_default="RUN-roundN.yaml")
def command(run: str, out: str | None) -> None:
    """Write the spec of the next round of RUN, a finished run directory or its job file, on whose models people voted.

    The next round starts from the best model of RUN: the one that wins most in the evaluation, or without one the last
    that was trained. It learns from the votes and from a part of the earlier data. Stages that can learn from the
    votes stay, with their settings. If there are none, DPO learns from the comparisons, or KTO if most votes are
    thumbs. The comments say why, and everything can be changed.

    Its evaluation asks the same prompts as that of RUN, which stay out of the training data, so that compare and the
    report can show the rounds side by side.
    """
    run_dir = find_run(run)
    acting.check(run_dir)
    spec = read_spec(run_dir.job_yaml)
    if not spec.policies:
        raise HpcRlhfError("this run trains no chat model, so there is no next round", where=str(run_dir.path))
    if missing := [stage for stage in spec.stage_names if not manifest.is_done(run_dir.stage(stage))]:
        raise unfinished(run_dir, "the next round starts from finished models", missing, INPUT_WRONG)
    following = next_round(run_dir, spec)
    file = f"{Path(following.fields['run_dir']).name}.yaml" if out is None else out
    text = commented(following.fields, following.notes)
    check_tree(parse_yaml(text, Mark(file, 1, 1)))
    click.echo(f"starts from {following.start}", err=True)
    write_new(text, file, "check")
