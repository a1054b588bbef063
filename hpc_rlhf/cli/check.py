"""hpc-rlhf check: list every error in job specs and in their data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, json_option, set_option
from hpc_rlhf.cli.console import print_wrapped
from hpc_rlhf.errors import INPUT_WRONG, Problem, SpecError
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.masking import secret_names
from hpc_rlhf.spec import rollout_checks
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.layers import read_layers
from hpc_rlhf.spec.sweep import Sweep, load_any, specs_of
from hpc_rlhf.spec.yaml_source import Mark


@dataclass(frozen=True)
class _Checked:
    """A file's specs, their errors, and the verdict if there are none.

    Attributes:
        data: what became of the rows of the data, by stage, in words and as JSON.
        notes: warnings about the data.
    """

    specs: tuple[JobSpec, ...] = ()
    problems: tuple[Problem, ...] = ()
    verdict: str = "ok"
    data: Mapping[str, Sequence[tuple[str, Mapping[str, object]]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@click.command(epilog=example("hpc-rlhf check my-job.yaml --set slurm.nodes=2"))
@click.argument("files", nargs=-1, required=True)
@set_option
@click.option("--data", "whole", is_flag=True, help="Read all rows, and show what each stage will do with them.")
@json_option
@click.pass_context
def command(ctx: click.Context, files: tuple[str, ...], sets: tuple[str, ...], whole: bool, as_json: bool) -> None:
    """Check job specs and their data, and list every error.

    Each error is one line, FILE:LINE:COLUMN: FIELD: ERROR (HINT). The exit code is 2 if there are any. All
    runs of a sweep are checked.

    For local data, check reads the first rows of each file, and reports a stage that could use none of them.
    --data reads every row: it shows how many rows each stage will train on, hold out, leave out or cut, why,
    and which row is the first. What is cut depends on the tokenizer, which must be on this machine or be
    trained on the data.

    --json prints a list of errors for each file; with --data, an object with `problems`, `notes` and `data`,
    which has for each stage what became of the rows of each source.
    """
    checked = _with_data({file: _check(file, sets) for file in files}, sets, whole)
    if as_json:
        click.echo(json.dumps({file: _facts(one, whole) for file, one in checked.items()}, indent=2))
    else:
        for file, one in checked.items():
            for line in _lines(file, one):
                print_wrapped(line, err=False)
    bad = sum(1 for one in checked.values() if one.problems)
    if bad:
        click.echo(f"{bad} of {len(checked)} spec{'s' * (len(checked) > 1)} cannot run", err=True)
        ctx.exit(INPUT_WRONG)


def _check(file: str, sets: tuple[str, ...]) -> _Checked:
    """A file's specs, and the errors in them."""
    try:
        spec = load_any(file, sets)
        if any(one.autos or RunDir(Path(one.run_dir)).job_yaml.exists() for one in specs_of(spec)):
            from hpc_rlhf.launch.auto import load  # estimates are slow to import

            spec = load(file, sets)
    except SpecError as error:
        return _Checked(problems=error.problems)
    return _Checked(specs_of(spec), verdict=f"ok, {spec.summary}" if isinstance(spec, Sweep) else "ok")


def _with_data(checked: dict[str, _Checked], sets: tuple[str, ...], whole: bool) -> dict[str, _Checked]:
    """The files with what is known of their data, which one process reads for all."""
    from hpc_rlhf.launch.survey import survey

    surveys = iter(survey([spec for one in checked.values() for spec in one.specs], whole))
    result = {}
    for file, one in checked.items():
        problems: dict[Problem, None] = dict.fromkeys(one.problems)
        data: dict[str, Sequence[tuple[str, Mapping[str, object]]]] = {}
        notes: dict[str, None] = {}
        for spec in one.specs:
            known = next(surveys)
            problems |= dict.fromkeys(
                _place(file, sets, path).problem(what, hint or None, path) for path, what, hint in known.problems
            )
            notes |= dict.fromkeys((*_secrets(spec), *_absent(spec), *known.notes))
            data |= {path: [(one.summary(), one.to_dict()) for one in counts] for path, counts in known.data.items()}
        result[file] = replace(one, problems=tuple(problems), notes=tuple(notes), data=data if whole else {})
    return result


def _secrets(spec: JobSpec) -> Iterator[str]:
    """A warning for each secret that a setup line holds."""
    for stage in spec.stage_names:
        slurm = spec.stage(stage).slurm
        for line in (*slurm.setup, *(slurm.heal.setup or ())):
            for name in secret_names(line):
                yield (
                    f"slurm.setup holds the value of {name}, and so will the run directory; keep it in a file that "
                    f"only you can read: export {name}=$(cat FILE)"
                )


def _absent(spec: JobSpec) -> Iterator[str]:
    """A warning for each stage that needs a vLLM that is not on this machine."""
    for stage, wrong in rollout_checks.absent(spec):
        yield f"submit and run will refuse stages.{stage}.rollout: {wrong} ({rollout_checks.INSTALL})"


def _place(file: str, sets: tuple[str, ...], path: str) -> Mark:
    """The place of a field in a file, or of the innermost part of it that the file has."""
    node = read_layers(Path(file), sets)
    for key in path.split("."):
        if (inner := node.inner(key)) is None:
            break
        node = inner
    return node.place


def _lines(file: str, checked: _Checked) -> Iterator[str]:
    yield from map(str, checked.problems)
    if not checked.problems:
        yield f"{file}: {checked.verdict}"
    for path, counts in checked.data.items():
        yield from (f"{file}: {path}: {words}" for words, _ in counts)
    yield from (f"{file}: warning: {note}" for note in checked.notes)


def _facts(checked: _Checked, whole: bool) -> object:
    problems = [asdict(problem) for problem in checked.problems]
    data = {path: [facts for _, facts in counts] for path, counts in checked.data.items()}
    return {"problems": problems, "notes": checked.notes, "data": data} if whole else problems
