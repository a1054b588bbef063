"""A sweep: one spec that describes several runs, and the stages that these share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from hpc_rlhf.errors import Problem, SpecError
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.layers import read_layers
from hpc_rlhf.spec.load import check_tree, in_order
from hpc_rlhf.spec.member import Member, make_members, name_of
from hpc_rlhf.spec.search import SEARCH, Search, read_search
from hpc_rlhf.spec.space import MAX_RUNS
from hpc_rlhf.spec.stage_inputs import fingerprint
from hpc_rlhf.spec.stages import STAGE_NAMES
from hpc_rlhf.spec.yaml_source import Node

_FIELDS = ("sweep", "sweep_limit")
_OWN = ("name", "run_dir", *_FIELDS, "extends")
_TIMES = {1: "once", 2: "twice"}


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep; the last path varies fastest.

    Attributes:
        run_dir: folder of their run directories.
        limit: maximum number of runs with running jobs at a time; None for no limit.
        members: its runs; those of a search, as it is loaded, are the corners of its space.
        search: how to choose the runs; None to take all combinations.
    """

    run_dir: Path
    limit: int | None
    members: tuple[Member, ...]
    search: Search | None = None

    @property
    def specs(self) -> dict[str, JobSpec]:
        """The spec of each run by its name."""
        return {member.name: member.spec for member in self.members}

    @property
    def summary(self) -> str:
        """What is searched, or how often each stage has to run, in words."""
        if self.search is not None:
            return self.search.summary
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
    sweep = root.fields["sweep"]
    axes = _axes(root, sweep)
    limit = _limit(root)
    base = replace(root, value={key: node for key, node in root.fields.items() if key not in _FIELDS})
    search = read_search(base, sweep) if sweep.is_set(SEARCH) else None
    members = search.corners() if search else _members(base, axes)
    return Sweep(Path(members[0].spec.run_dir).parent, limit, members, search)


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
            lender = first.setdefault(fingerprint(spec, stage), name)
            if lender != name:
                shared[name, stage] = lender
    return shared


def _axes(root: Node, sweep: Node) -> dict[str, Node]:
    """The values by path. Raises SpecError if a path or its values are invalid."""
    axes = {path: node for path, node in sweep.fields.items() if path != SEARCH}
    if not axes:
        what = "must map paths to lists of values"
        raise SpecError([sweep.mark.problem(what, "such as {stages.ppo.kl_coef: [0.02, 0.1]}", "sweep")])
    searched = sweep.is_set(SEARCH)
    problems = [problem for path, node in axes.items() for problem in _problems(root, path, node, searched)]
    count = math.prod(len(node.value) for node in axes.values() if isinstance(node.value, list))
    if not problems and not searched and count > MAX_RUNS:
        hint = "use fewer values, several sweeps, or a search"
        problems.append(sweep.place.problem(f"makes {count} runs; the maximum is {MAX_RUNS}", hint, "sweep"))
    if problems:
        raise SpecError(in_order(problems))
    return axes


def _problems(root: Node, path: str, node: Node, searched: bool) -> Iterator[Problem]:
    keys = path.split(".")
    if not all(keys) or keys[0] in _OWN:
        what = "cannot differ between the runs of a sweep"
        yield node.place.problem(what, "name a field by its path, such as stages.ppo.kl_coef", f"sweep.{path}")
    elif keys[0] == "stages" and keys[2:] and keys[1] in STAGE_NAMES and not root.is_set(*keys[:2]):
        yield node.place.problem(f"this spec has no {keys[1]} stage", None, f"sweep.{path}")
    is_range = bool({"low", "high"} & node.fields.keys())
    if is_range and not searched:
        hint = "such as [0.02, 0.1]; for a range add search: {method: tpe, trials: 12, metric: eval.reward}"
        yield node.mark.problem("must be a list of values", hint, f"sweep.{path}")
    elif not is_range and (not isinstance(node.value, list) or not node.value):
        kinds = "a list of values, or a range" if searched else "a list of values"
        hint = "such as [0.02, 0.1]" + (" or {low: 0.01, high: 0.5, log: true}" if searched else "")
        yield node.mark.problem(f"must be {kinds}", hint, f"sweep.{path}")


def _limit(root: Node) -> int | None:
    node = root.get("sweep_limit")
    if node is None or node.value is None:
        return None
    if type(node.value) is not int or node.value < 1:
        raise SpecError([node.mark.problem("must be a whole number of at least 1", None, "sweep_limit")])
    return node.value


def _members(base: Node, axes: Mapping[str, Node]) -> tuple[Member, ...]:
    """The runs for all combinations of values. Raises SpecError with every problem in any of them."""
    named: dict[str, dict[str, Node]] = {}
    lists = [node.value for node in axes.values() if isinstance(node.value, list)]
    for chosen in product(*lists):
        by_path = {path: replace(node, key=axes[path].place) for path, node in zip(axes, chosen, strict=True)}
        name = name_of({path: node.plain() for path, node in by_path.items()})
        if name in named:
            hint = "give each value once; values must differ in characters that are allowed in names"
            mark = next(iter(axes.values())).mark
            raise SpecError([mark.problem(f"two runs would have the folder {name}", hint, "sweep")])
        named[name] = by_path
    return make_members(base, named)
