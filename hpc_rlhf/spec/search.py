"""A search: a sweep whose runs, its trials, take values that are chosen from the results of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from pydantic import ValidationError

from hpc_rlhf.errors import Problem, SpecError
from hpc_rlhf.spec.fields import Model
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.layers import put
from hpc_rlhf.spec.load import dump_yaml, in_order
from hpc_rlhf.spec.member import Member, make_members, name_of
from hpc_rlhf.spec.metric import Metric, halving_metrics_of, metrics_of
from hpc_rlhf.spec.paths import resolve_paths
from hpc_rlhf.spec.problems import problems_of
from hpc_rlhf.spec.space import Choices, RangeSpec, SearchSpec, Space, index_of, size
from hpc_rlhf.spec.stage_inputs import fingerprint
from hpc_rlhf.spec.yaml_source import Node

SEARCH = "search"  # the key beside the paths of a sweep
_MOST_CORNERS = 64
_OUTSIDE = {  # fields that change what a metric is measured on, or whether runs compare, and why
    "data": "decides on which data the metric is measured",
    "stages.eval": "decides how the metric is measured",
    "follows": "decides on which prompts the metric is measured",
    "seed": "has no best value: a search would find the luckiest",
}
M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        spec: its method, trials and metric.
        space: the values of each path.
        seed: decides which values are chosen at random.
        base: the spec without the sweep.
        axes: the nodes of the space, by path.
    """

    spec: SearchSpec
    space: Space
    seed: int
    base: Node
    axes: Mapping[str, Node]

    @property
    def metric(self) -> Metric:
        return Metric.of(self.spec.metric)

    @property
    def halving(self) -> Metric | None:
        return None if self.spec.halving is None else Metric.of(self.spec.halving)

    def member(self, values: Mapping[str, object]) -> Member:
        """The run with some values of the space, as they are or as JSON has them.

        Raises:
            SpecError: the spec does not allow them together.
        """
        name = name_of(values)
        return make_members(self.base, {name: {path: self._node(path, value) for path, value in values.items()}})[0]

    def has(self, values: Mapping[str, object]) -> bool:
        """Whether the space has these values."""

        def inside(path: str) -> bool:
            axis = self.space[path]
            return axis.has(values[path]) if isinstance(axis, RangeSpec) else index_of(axis, values[path]) is not None

        return values.keys() == self.space.keys() and all(map(inside, values))

    def corners(self) -> tuple[Member, ...]:
        """Runs with the first or last values of ranges and all of lists, by which to check, plan and estimate the rest.

        Raises:
            SpecError: the spec does not allow their values.
        """
        ends = {
            path: (axis.low, axis.high) if isinstance(axis, RangeSpec) else axis for path, axis in self.space.items()
        }
        all_ = product(*ends.values()) if math.prod(map(len, ends.values())) <= _MOST_CORNERS else ()
        choices = [*(self.beside(path) for path in self.space), [dict(zip(ends, each, strict=True)) for each in all_]]
        named = {
            name_of(values): {path: self._node(path, value) for path, value in values.items()}
            for several in choices
            for values in several
        }
        return make_members(self.base, named)

    def beside(self, path: str) -> list[dict[str, object]]:
        """The first values of the space, with each end of one path."""
        first = {each: _ends(axis)[0] for each, axis in self.space.items()}
        return [{**first, path: end} for end in _ends(self.space[path])]

    @property
    def summary(self) -> str:
        """What is searched, in words."""
        fields = f"{len(self.space)} field{'s' * (len(self.space) > 1)}"
        goal = "lowest" if self.metric.lower_is_better else "highest"
        trials = f"{self.spec.trials} trials ({self.spec.method})"
        return f"a search of {trials} over {fields} for the {goal} {self.spec.metric}"

    def dump(self) -> str:
        """A job file with the same search, which may be anywhere."""
        sweep = {SEARCH: self.spec.model_dump(), **{path: node.plain() for path, node in self.axes.items()}}
        return dump_yaml({**resolve_paths(self.base)[0].plain(), "sweep": sweep})

    def _node(self, path: str, value: object) -> Node:
        node, axis = self.axes[path], self.space[path]
        if isinstance(axis, RangeSpec):
            assert isinstance(value, int | float)
            return Node(value, node.mark, node.key)
        index = index_of(axis, value)
        assert isinstance(node.value, list)
        assert index is not None
        return replace(node.value[index], key=node.place)


def read_search(base: Node, sweep: Node) -> Search:
    """A search.

    Args:
        base: the spec without the sweep.
        sweep: the sweep, whose paths may differ between runs.

    Raises:
        SpecError: every problem in it.
    """
    given = sweep.fields[SEARCH]
    spec, problems = _model(SearchSpec, given, f"sweep.{SEARCH}")
    axes = {path: _resolved(path, node) for path, node in sweep.fields.items() if path != SEARCH}
    space: dict[str, tuple[object, ...] | RangeSpec] = {}
    for path, node in axes.items():
        if isinstance(node.value, dict):
            axis, wrong = _model(RangeSpec, node, f"sweep.{path}")
            problems += wrong
            space |= {path: axis} if axis else {}
        else:
            space[path] = node.plain()
        problems += _refusals(path, node)
    if spec is None or problems:
        raise SpecError(in_order(problems))
    seed = base.get("seed")
    search = Search(spec, space, seed.value if seed and isinstance(seed.value, int) else 0, base, axes)
    if problems := [*_size_problems(search, given), *_metric_problems(search, given)]:
        raise SpecError(in_order(problems))
    return search


def _ends(axis: Choices | RangeSpec) -> tuple[object, ...]:
    """Both ends of a range, or all values of a list."""
    return (axis.low, axis.high) if isinstance(axis, RangeSpec) else axis


def _model(kind: type[M], node: Node, path: str) -> tuple[M | None, list[Problem]]:
    """The fields of a node, and the problems in it."""
    try:
        return kind.model_validate(node.plain(), strict=True), []
    except ValidationError as error:
        problems = problems_of(error, node)
        return None, [replace(problem, path=".".join(filter(None, (path, problem.path)))) for problem in problems]


def _resolved(path: str, node: Node) -> Node:
    """A list of values with the paths in them resolved, which may be written elsewhere then."""
    if not isinstance(node.value, list):
        return node
    keys = path.split(".")
    trees = [resolve_paths(put(None, keys, value, value.mark))[0] for value in node.value]
    return replace(node, value=[resolved for tree in trees if (resolved := tree.get(*keys))])


def _refusals(path: str, node: Node) -> Iterator[Problem]:
    for outside, why in _OUTSIDE.items():
        if f"{path}.".startswith(f"{outside}."):
            yield node.place.problem(f"cannot be searched: it {why}", "give it one value", f"sweep.{path}")
    if isinstance(node.value, list):
        names = [name_of({path: value.plain()}) for value in node.value]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            hint = "give each value once; values must differ in characters that are allowed in names"
            yield node.mark.problem(f"two values are called {twice}", hint, f"sweep.{path}")


def _size_problems(search: Search, given: Node) -> Iterator[Problem]:
    """What is wrong with the number of combinations."""
    count = math.prod(map(size, search.space.values()))
    if search.spec.trials > count:
        what = f"is {search.spec.trials}, but there are only {count} combinations of values"
        yield given.fields["trials"].mark.problem(what, None, "sweep.search.trials")
    elif search.spec.method == "grid" and count == math.inf:
        path = next(path for path, axis in search.space.items() if size(axis) == math.inf)
        hint = "give it a step or a list of values, or use method: tpe"
        yield search.axes[path].place.problem("has no end of values, too many for a grid", hint, f"sweep.{path}")


def _metric_problems(search: Search, given: Node) -> Iterator[Problem]:
    """Why the trials do not have the metrics of the search, or do not compare by them."""
    first = search.member(search.beside(next(iter(search.space)))[0]).spec
    more = "" if first.evaluation else "; more with eval: {} in stages"
    yield from _problems_of(search, first, given.fields["metric"], "metric", metrics_of(first), more)
    halving = search.halving
    if halving is None:
        return
    node, known = given.fields["halving"], halving_metrics_of(first)
    yield from _problems_of(search, first, node, "halving", known, "; it needs eval_every in its stage")
    if search.spec.halving in known and first.stage(halving.stage).slurm.container is not None:
        what = f"needs a stage outside a container, from which trials see each other; {halving.stage} is in one"
        yield node.mark.problem(what, None, "sweep.search.halving")


def _problems_of(
    search: Search, first: JobSpec, node: Node, field: str, known: Sequence[str], more: str
) -> Iterator[Problem]:
    """The problems of a metric.

    Args:
        first: the spec at the first corner of the space.
        field: of the search, which names the metric.
        known: the metrics that the field may name.
        more: where further ones come from.
    """
    metric = Metric.of(str(node.value))
    if node.value not in known:
        hint = f"possible: {', '.join(known) or 'none'}{more}"
        yield node.mark.problem("is not such a metric of this spec", hint, f"sweep.search.{field}")
        return
    for path, axis in search.axes.items():
        specs = [search.member(values).spec for values in search.beside(path)]
        if len({fingerprint(spec, metric.stage) for spec in specs}) == 1 and len(specs) > 1:
            yield axis.place.problem(f"does not affect {node.value}", "give it one value", f"sweep.{path}")
        elif any(metric.scale(spec) != metric.scale(first) for spec in specs):
            what = f"trials that differ in {path} do not compare by {node.value}, {metric.relative}"
            yield node.mark.problem(what, f"use another metric, or give {path} one value", f"sweep.search.{field}")
