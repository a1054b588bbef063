"""hpc-rlhf push: upload a trained model to the hub."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, run_argument
from hpc_rlhf.observe import results
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.models import intact_model
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.run import manifest, model_card
from hpc_rlhf.run.format import size
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import EVALUATION, POLICIES


@click.command(
    epilog=example("hpc-rlhf push my-job.yaml me/my-model --dry-run", "hpc-rlhf push my-job.yaml me/my-model --public")
)
@run_argument
@click.argument("repo")
@click.option(
    "--stage", type=click.Choice(tuple(POLICIES)), help="Model to upload.", show_default="the latest finished"
)
@click.option("--public", is_flag=True, help="Let everybody read a new repository; by default it is private.")
@click.option("--dry-run", is_flag=True, help="Print the model card and what would be uploaded, and upload nothing.")
def command(run: str, repo: str, stage: str | None, public: bool, dry_run: bool) -> None:
    """Upload a finished model of RUN, a run directory or job file, to the model repository REPO of the Hugging Face
    hub.

    The model card says what the model was made from, with which settings and results; local paths stay out of it. The
    files are compared with their SHA-256 first, and published in one commit. It needs a token that may write: hf auth
    login, or HF_TOKEN. HF_ENDPOINT chooses another hub.
    """
    run_dir = find_run(run)
    name, folder = intact_model(run_dir, stage)
    card = make_card(run_dir, name, repo)
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    files[model_card.NAME] = card.encode()
    if dry_run:
        click.echo(printable(card))
    for name_, file in files.items():
        length = len(file) if isinstance(file, bytes) else file.stat().st_size
        click.echo(f"{name_}  {size(length)}", err=not dry_run)
    if dry_run:
        return
    from hpc_rlhf.launch.push import push

    click.echo(push(files, repo, public, f"Upload {name} of {read_spec(run_dir.job_yaml).name}"))


def make_card(run: RunDir, model: str, repo: str) -> str:
    """The model card of a finished model, with the results of the run's evaluation if there are some."""
    evaluation = ""
    if manifest.is_done(run.stage(EVALUATION.name)):
        report = results.read_report(run)
        rows = results.table_rows(report)
        evaluation = "\n\n".join([model_card.table(rows[0], rows[1:]) if rows else "", *results.notes(report)])
    metrics = {stage: result.metrics for stage, result in results.stage_results(run).items()}
    return model_card.model_card(read_spec(run.job_yaml), model, metrics, evaluation, repo)
