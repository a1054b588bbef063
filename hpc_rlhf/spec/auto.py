"""The word `auto` in a stage: taken out of a spec's tree, so that models hold numbers; `launch/auto.py` chooses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hpc_rlhf.errors import Problem
from hpc_rlhf.spec.fields import AUTO
from hpc_rlhf.spec.stages import EVALUATION
from hpc_rlhf.spec.yaml_source import Mark, Node

WORDS = ("zero", "micro_batch", "offload")
OFFLOADS = ("offload_optimizer", "offload_params", "offload_frozen")

# Where a spec says auto: the places, by stage and field.
Autos = Mapping[str, Mapping[str, Mark]]


def take_out(root: Node) -> tuple[Node, Autos, list[Problem]]:
    """A spec's tree with numbers that may stand wherever a stage says auto, where that was, and what is wrong with it."""
    stages = root.get("stages")
    if stages is None or not isinstance(stages.value, dict):
        return root, {}, []
    assert isinstance(root.value, dict)
    autos: dict[str, dict[str, Mark]] = {}
    problems: list[Problem] = []
    new = dict(stages.value)
    for name, stage in stages.value.items():
        if not isinstance(stage.value, dict):
            continue
        fields = dict(stage.value)
        if name == EVALUATION.name and "offload" in fields and fields["offload"].value is None:
            del fields["offload"]  # that of the last stage that trains, whose field it is
        said = {word: fields[word] for word in WORDS if word in fields and fields[word].value == AUTO}
        if said:
            autos[name] = {word: node.mark for word, node in said.items()}
            problems += _wrong(name, fields, said)
        new[name] = replace(stage, value=_without(fields, said))
    tree = replace(root, value={**root.value, "stages": replace(stages, value=new)})
    return tree, autos, problems


def _without(fields: dict[str, Node], said: Mapping[str, Node]) -> dict[str, Node]:
    """A stage's fields with the least in place of auto that goes together with the others."""
    needed = {"offload_optimizer": 1, "offload_params": 3}
    least = [zero for field, zero in needed.items() if field in fields and fields[field].value is True]
    numbers: dict[str, Any] = {"zero": max(least, default=0), "micro_batch": 1}
    kept = {key: node for key, node in fields.items() if key not in said}
    return {**kept, **{key: replace(said[key], value=numbers[key]) for key in numbers if key in said}}


def _wrong(name: str, fields: dict[str, Node], said: Mapping[str, Node]) -> list[Problem]:
    problems = []
    path = f"stages.{name}"
    whole = fields.get("global_batch")
    if "micro_batch" in said and name != EVALUATION.name and (whole is None or whole.value is None):
        what = "auto needs global_batch, so that what is learnt does not depend on a GPU's memory"
        problems.append(said["micro_batch"].mark.problem(what, "set it", f"{path}.micro_batch"))
    for field in OFFLOADS if "offload" in said else ():
        if field in fields:
            what = "is chosen by offload: auto; take one of them out"
            problems.append((fields[field].key or fields[field].mark).problem(what, None, f"{path}.{field}"))
    return problems
