"""Loads a job spec, or raises every error in it; writes and reads the copy in a run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from hpc_rlhf.errors import HpcRlhfError, Problem, SpecError
from hpc_rlhf.spec import model_checks, reward_checks, rollout_checks, round_checks
from hpc_rlhf.spec.auto import extract_autos
from hpc_rlhf.spec.batch import check_groups, data_ranks, derive_batch, layer_groups, row_groups
from hpc_rlhf.spec.data import DataSpec
from hpc_rlhf.spec.fields import Model
from hpc_rlhf.spec.inheritance import inherit
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.layers import read_layers
from hpc_rlhf.spec.paths import resolve_paths
from hpc_rlhf.spec.problems import problems_of
from hpc_rlhf.spec.source import CELLS
from hpc_rlhf.spec.stages import EVALUATION, STAGE_KINDS, Data, kind_of
from hpc_rlhf.spec.training import LoraSpec, TrainingSpec
from hpc_rlhf.spec.yaml_source import FLOAT, Node, read_yaml

AnyModel = TypeVar("AnyModel", bound=Model)
_PAIRLESS = ("instruction", "text", "prompt", "thumb")  # formats without a rejected response


def load_spec(path: Path | str, sets: Sequence[str] = ()) -> JobSpec:
    """Load a user's spec, with the options `a.b.c=VALUE` applied in order.

    Raises:
        SpecError: every problem with its place; or the spec is a sweep.
    """
    root = read_layers(Path(path), sets)
    if root.is_set("sweep"):
        hint = "--set sweep=null loads the spec without it"
        what = "makes several runs, but this command takes one"
        raise SpecError([root.fields["sweep"].place.problem(what, hint, "sweep")])
    return check_tree(root)


def check_tree(root: Node) -> JobSpec:
    """The spec of a tree of nodes. Fields set to auto hold the smallest valid number.

    Raises:
        SpecError: every problem with its place.
    """
    root, problems = resolve_paths(root)
    root, autos, wrong = extract_autos(inherit(root))
    problems += wrong
    try:
        spec = JobSpec.model_validate(root.plain(), strict=True)
    except ValidationError as error:
        raise SpecError(in_order(problems + problems_of(error, root))) from None
    problems += _cross_check(spec, root)
    if problems:
        raise SpecError(in_order(problems))
    return spec.with_autos(autos)


def read_spec(path: Path) -> JobSpec:
    """Read a spec that `dump_spec` wrote."""
    root = read_yaml(path, str(path))
    fields = root.plain()
    if isinstance(fields.get("data"), dict):
        fields["data"] = {**DataSpec.before, **fields["data"]}
    for kind in STAGE_KINDS:
        stage = (fields.get("stages") or {}).get(kind.name)
        if isinstance(stage, dict):
            for part in (stage, stage.get("critic")):
                if isinstance(part, dict) and isinstance(part.get("lora"), dict):
                    part["lora"] = {**LoraSpec.before, **part["lora"]}
            fields["stages"][kind.name] = {**kind.spec.before, **stage}
    try:
        return JobSpec.model_validate(fields, strict=True)
    except ValidationError as error:
        raise SpecError(in_order(problems_of(error, root))) from None


def rounds(spec: JobSpec) -> list[JobSpec]:
    """The specs of the runs that a run follows, the first round first, and its own.

    Raises:
        SpecError: one of them cannot be read.
        HpcRlhfError: a run follows itself, over others or directly.
    """
    chain, followed = [spec], {spec.run_dir}
    while (folder := chain[0].follows) is not None:
        if folder in followed:
            raise HpcRlhfError("the run follows itself", where=folder, hint="give another run_dir")
        followed.add(folder)
        chain.insert(0, read_spec(Path(folder) / "job.yaml"))
    return chain


def continued(spec: JobSpec, begun: JobSpec) -> JobSpec:
    """A user's spec for a run that an earlier version began: fields that the user leaves out keep that version's
    defaults.

    Args:
        begun: the spec in the run directory.
    """
    if begun.data.version == 2:
        return spec

    def kept(now: AnyModel, old: Model) -> AnyModel:
        before: dict[str, object] = getattr(now, "before", {})
        left_out = [name for name in before if name not in now.model_fields_set and getattr(old, name) == before[name]]
        changes: dict[str, object] = {name: before[name] for name in left_out}
        for name in type(now).model_fields:
            mine, theirs = getattr(now, name), getattr(old, name)
            if isinstance(mine, Model) and type(mine) is type(theirs) and (part := kept(mine, theirs)) is not mine:
                changes[name] = part
        return now.model_copy(update=changes) if changes else now

    data, stages = kept(spec.data, begun.data), kept(spec.stages, begun.stages)
    return spec.model_copy(update={"data": data, "stages": stages})


def dump_spec(spec: JobSpec) -> str:
    """The spec as YAML, every default written out."""
    return dump_yaml(spec.model_dump(exclude={"sweep", "sweep_limit"}))


def dump_yaml(fields: Mapping[str, Any]) -> str:
    """The YAML of plain values, which ``read_yaml`` and other readers read as the same."""
    return yaml.dump(dict(fields), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


class Dumper(yaml.SafeDumper):
    """Writes no aliases, and quotes text that this or another YAML reader would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def _cross_check(spec: JobSpec, root: Node) -> list[Problem]:
    """Problems between fields that are valid on their own."""

    def problem(path: str, what: str, hint: str | None = None) -> Problem:
        keys = path.split(".")
        while (node := root.get(*keys)) is None:  # a default: point at the mapping that would contain it
            keys = keys[:-1]
        mark = node.place if isinstance(node.value, dict | list) else node.mark
        return mark.problem(what, hint, path)

    problems = []
    # Slurm expands % in log paths; commas and colons separate a container's mounts.
    contained = any(spec.stage(name).slurm.container for name in spec.stage_names)
    if special := sorted(set("%\\,:" if contained else "%\\") & set(spec.run_dir)):
        what = f"must not contain {' or '.join(special)}, which have a meaning for Slurm or a container"
        problems.append(problem("run_dir", what))
    for name in spec.stage_names:
        derivations = {
            "tensor_parallel": layer_groups,
            "sequence_parallel": row_groups,
            "pipeline_parallel": data_ranks,
            "global_batch": derive_batch,
            "group_size": check_groups,
        }
        for field, derive in derivations.items():
            try:
                derive(spec.stage(name), name)
            except ValueError as error:
                problems.append(problem(f"stages.{name}.{field}", str(error)))
                break
        problems += [problem(f"stages.{name}.{field}", what) for field, what in spec.stage(name).refusals().items()]
        if spec.shares.get(name, 1) == 0:
            problems.append(problem(f"data.split.{name}", f"leaves the {name} stage without data"))
    for name in spec.trained:
        problems += [problem(f"stages.{name}.{field}", what) for field, what in _check_evaluations(spec, name)]
    needy = [*spec.shares, *([EVALUATION.name] if spec.evaluation else [])]
    if needy and not spec.data.sources:
        problems.append(
            problem("data.sources", f"must not be empty: {' and '.join(needy)} need{'s' * (len(needy) == 1)} data")
        )
    if spec.evaluation and spec.data.held_out == 0:
        problems.append(problem("data.held_out", f"leaves the {EVALUATION.name} stage without data"))
    paired = next((name for name in spec.stage_names if kind_of(name).data is Data.PAIRS), None)
    if (
        paired
        and spec.data.sources
        and all((source.row_format in _PAIRLESS or source.arithmetic) for source in spec.data.sources)
    ):
        what = f"none contains pairs of responses, which the {paired} stage trains on"
        problems.append(problem("data.sources", what))
    for path, source in spec.sources.items():
        if source.feedback and not path.startswith("data."):
            problems.append(problem(f"{path}.feedback", "only data.sources can have votes"))
        if source.format and source.further and not (spec.uses_columns and path.startswith("data.")):
            read = ", ".join(CELLS[source.format])
            what = f"has {source.further[0]}, which the format {source.format} does not read, and rewards do not either"
            problems.append(problem(f"{path}.columns", what, f"the format reads {read}"))
    if spec.follows is not None and (Path(spec.follows) / "job.yaml").is_file():  # else its path is a problem already
        problems += [problem(*each) for each in round_checks.problems(spec, rounds(spec)[-2])]
    others = [*model_checks.problems(spec), *reward_checks.problems(spec), *rollout_checks.problems(spec)]
    return [*problems, *(problem(*each) for each in others)]


def _check_evaluations(spec: JobSpec, name: str) -> Iterator[tuple[str, str]]:
    """Fields of a stage's evaluations during training that cannot work, and why."""
    stage, metrics = spec.stage(name), kind_of(name).held_out
    assert isinstance(stage, TrainingSpec)
    if stage.eval_every is not None and not metrics:
        yield "eval_every", f"the {name} stage has no evaluations during training"
    elif stage.eval_every is not None and spec.held_out(name) == 0:
        where = f"stages.{name}" if hasattr(stage, "held_out") else "data"
        yield "eval_every", f"needs held-out data, but {where}.held_out is 0"
    if stage.keep_best is not None and stage.keep_best not in metrics:
        yield "keep_best", f"must be {' or '.join(metrics) or 'null'}, not {stage.keep_best}"
    elif stage.keep_best is not None and stage.eval_every is None:
        yield "keep_best", "needs eval_every, because there is only one evaluation without it"


def in_order(problems: list[Problem]) -> list[Problem]:
    """The problems in the order of the files; those without a line come last."""
    return sorted(problems, key=lambda problem: (not problem.line, problem.source, problem.line, problem.column))
