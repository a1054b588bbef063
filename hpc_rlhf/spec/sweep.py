"""A sweep: one spec that describes several runs, and the stages that these share."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path

from hpc_rlhf.errors import Problem, SpecError
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.layers import put, read_layers
from hpc_rlhf.spec.load import check_tree, in_order
from hpc_rlhf.spec.stage_inputs import inputs
from hpc_rlhf.spec.stages import STAGE_NAMES
from hpc_rlhf.spec.yaml_source import Mark, Node

MAX_RUNS = 200  # each is a folder and several queued jobs
_FIELDS = ("sweep", "sweep_limit")
_OWN = ("name", "run_dir", *_FIELDS, "extends")
_TIMES = {1: "once", 2: "twice"}
_MAX_VALUE = 48  # characters of a value in a name


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: name of its folder in the sweep's, made of its values.
        values: its value of each swept path.
        spec: a complete spec, without the sweep.
    """

    name: str
    values: Mapping[str, object]
    spec: JobSpec


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep; the last path varies fastest.

    Attributes:
        run_dir: folder of their run directories.
        limit: maximum number of runs with running jobs at a time; None for no limit.
    """

    run_dir: Path
    limit: int | None
    members: tuple[Member, ...]

    @property
    def specs(self) -> dict[str, JobSpec]:
        """The spec of each run by its name."""
        return {member.name: member.spec for member in self.members}

    @property
    def summary(self) -> str:
        """How often each stage has to run, in words."""
        shared = lenders(self.specs)
        runs_per_stage = Counter(
            stage for name, spec in self.specs.items() for stage in spec.stage_names if (name, stage) not in shared
        )
        counts = [f"{stage} {_TIMES.get(count, f'{count} times')}" for stage, count in runs_per_stage.items()]
        return f"a sweep of {len(self.members)} runs: {', '.join(counts)}"


def load_any(path: Path | str, sets: Sequence[str] = ()) -> JobSpec | Sweep:
    """Load a user's spec, of a single run or a sweep, with the options `a.b.c=VALUE` applied in order.

    Raises:
        SpecError: every problem in it or in any of the runs, with its place.
    """
    root = read_layers(Path(path), sets)
    if not root.is_set("sweep"):
        return check_tree(root)
    axes = _axes(root, root.fields["sweep"])
    limit = _limit(root)
    base = replace(root, value={key: node for key, node in root.fields.items() if key not in _FIELDS})
    members = _members(base, axes)
    return Sweep(Path(members[0].spec.run_dir).parent, limit, members)


def specs_of(spec: JobSpec | Sweep) -> tuple[JobSpec, ...]:
    """The specs of all runs of a file, in order."""
    return (spec,) if isinstance(spec, JobSpec) else tuple(member.spec for member in spec.members)


def lenders(specs: Mapping[str, JobSpec]) -> dict[tuple[str, str], str]:
    """The stages that another run trains: (run, stage) -> the first run with the same stage.

    Args:
        specs: specs of the runs by name, in order of creation.
    """
    first: dict[str, str] = {}
    shared = {}
    for name, spec in specs.items():
        for stage in spec.stage_names:
            lender = first.setdefault(_fingerprint(spec, stage), name)
            if lender != name:
                shared[name, stage] = lender
    return shared


def _fingerprint(spec: JobSpec, stage: str) -> str:
    """A hash of everything that affects the result of a stage: equal for runs that can share it."""
    return sha256(json.dumps({"stage": stage, **inputs(spec, stage)}, sort_keys=True).encode()).hexdigest()


def _axes(root: Node, sweep: Node) -> dict[str, Node]:
    """The lists of values by path. Raises SpecError if a path or a list is invalid."""
    if not isinstance(sweep.value, dict) or not sweep.value:
        what = "must map paths to lists of values"
        raise SpecError([sweep.mark.problem(what, "such as {stages.ppo.kl_coef: [0.02, 0.1]}", "sweep")])
    problems = [problem for path, node in sweep.value.items() for problem in _problems(root, path, node)]
    count = math.prod(len(node.value) for node in sweep.value.values() if isinstance(node.value, list))
    if not problems and count > MAX_RUNS:
        hint = "use fewer values, or several sweeps"
        problems.append(sweep.place.problem(f"makes {count} runs; the maximum is {MAX_RUNS}", hint, "sweep"))
    if problems:
        raise SpecError(in_order(problems))
    return sweep.value


def _problems(root: Node, path: str, node: Node) -> Iterator[Problem]:
    keys = path.split(".")
    if not all(keys) or keys[0] in _OWN:
        what = "cannot differ between the runs of a sweep"
        yield node.place.problem(what, "name a field by its path, such as stages.ppo.kl_coef", f"sweep.{path}")
    elif keys[0] == "stages" and keys[2:] and keys[1] in STAGE_NAMES and not root.is_set(*keys[:2]):
        yield node.place.problem(f"this spec has no {keys[1]} stage", None, f"sweep.{path}")
    if not isinstance(node.value, list) or not node.value:
        yield node.mark.problem("must be a list of values", "such as [0.02, 0.1]", f"sweep.{path}")


def _limit(root: Node) -> int | None:
    node = root.get("sweep_limit")
    if node is None or node.value is None:
        return None
    if type(node.value) is not int or node.value < 1:
        raise SpecError([node.mark.problem("must be a whole number of at least 1", None, "sweep_limit")])
    return node.value


def _members(base: Node, axes: Mapping[str, Node]) -> tuple[Member, ...]:
    """The runs for all combinations of values. Raises SpecError with every problem in any of them."""
    labels = short_names(list(axes))
    named: dict[str, dict[str, Node]] = {}
    lists = [node.value for node in axes.values() if isinstance(node.value, list)]
    for chosen in product(*lists):
        by_path = dict(zip(axes, chosen, strict=True))
        name = _truncate("+".join(f"{labels[path]}={_text(node.plain())}" for path, node in by_path.items()), 200)
        if name in named:
            hint = "give each value once; values must differ in characters that are allowed in names"
            mark = next(iter(axes.values())).mark
            raise SpecError([mark.problem(f"two runs would have the folder {name}", hint, "sweep")])
        named[name] = by_path
    members, problems = [], dict[Problem, list[str]]()
    for name, by_path in named.items():
        try:
            members.append(_member(base, name, by_path, axes))
        except SpecError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(name)
    if problems:
        raise SpecError(in_order([_with_runs(problem, runs, named) for problem, runs in problems.items()]))
    return tuple(members)


def _member(base: Node, name: str, by_path: Mapping[str, Node], axes: Mapping[str, Node]) -> Member:
    tree = base
    for path, node in by_path.items():
        tree = put(tree, path.split("."), node, axes[path].place)
    spec = check_tree(tree)
    # Slurm shows the run's name, which allows fewer characters than the folder.
    shown = _truncate(f"{spec.name}.{name.replace('=', '-').replace('+', '.')}", 128)
    own = {"name": shown, "run_dir": str(Path(spec.run_dir, name))}
    return Member(name, {path: node.plain() for path, node in by_path.items()}, spec.model_copy(update=own))


def _with_runs(problem: Problem, names: Sequence[str], all_: Mapping[str, Mapping[str, Node]]) -> Problem:
    """The problem, with the runs that have it unless its place makes that clear."""
    values = {node.mark for by_path in all_.values() for node in by_path.values()}
    if len(names) == len(all_) or Mark(problem.source, problem.line, problem.column) in values:
        return problem
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return replace(problem, what=f"{problem.what} (in the run {names[0]}{more})")


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest suffix of each path that identifies it."""
    short = {}
    for path in paths:
        keys = path.split(".")
        tails = (".".join(keys[-count:]) for count in range(1, len(keys) + 1))
        short[path] = next(
            tail
            for tail in tails
            if tail == path or not any(f".{other}".endswith(f".{tail}") for other in paths if other != path)
        )
    return short


def _text(value: object) -> str:
    """A value as part of a folder name."""
    plain = value if isinstance(value, str) else json.dumps(value)
    return _truncate(re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-") or "none", _MAX_VALUE)


def _truncate(text: str, length: int) -> str:
    """The text truncated to a length, with a hash at its end to keep it unique."""
    return text if len(text) <= length else f"{text[: length - 9]}-{sha256(text.encode()).hexdigest()[:8]}"
