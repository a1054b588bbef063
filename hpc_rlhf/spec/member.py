"""The runs of a sweep: their values, names and specs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from hpc_rlhf.errors import Problem, SpecError
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.layers import put
from hpc_rlhf.spec.load import check_tree, in_order
from hpc_rlhf.spec.yaml_source import Mark, Node

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


def make_members(base: Node, named: Mapping[str, Mapping[str, Node]]) -> tuple[Member, ...]:
    """Runs by name, from a spec without a sweep and the values of each.

    Args:
        named: a node for each swept path, whose key is the place of that path.

    Raises:
        SpecError: every problem in any of their specs.
    """
    members, problems = [], dict[Problem, list[str]]()
    for name, by_path in named.items():
        try:
            members.append(_member(base, name, by_path))
        except SpecError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(name)
    if problems:
        raise SpecError(in_order([_with_runs(problem, runs, named) for problem, runs in problems.items()]))
    return tuple(members)


def _member(base: Node, name: str, by_path: Mapping[str, Node]) -> Member:
    tree = base
    for path, node in by_path.items():
        tree = put(tree, path.split("."), node, node.place)
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


def name_of(values: Mapping[str, object]) -> str:
    """The name of the run with these values of the swept paths."""
    labels = short_names(list(values))
    return _truncate("+".join(f"{labels[path]}={_text(value)}" for path, value in values.items()), 200)


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
