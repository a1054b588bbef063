"""Fields of stages set to `auto`: replaced by numbers before validation, chosen later by `launch/auto.py`."""

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

# The fields set to auto, with their places, by stage and field.
Autos = Mapping[str, Mapping[str, Mark]]


def extract_autos(root: Node) -> tuple[Node, Autos, list[Problem]]:
    """The tree with valid numbers in place of auto, the fields that were set to it, and the problems."""
    stages = root.get("stages")
    if stages is None or not isinstance(stages.value, dict):
        return root, {}, []
    autos: dict[str, dict[str, Mark]] = {}
    problems: list[Problem] = []
    new = dict(stages.value)
    for name, stage in stages.value.items():
        if not isinstance(stage.value, dict):
            continue
        fields = dict(stage.value)
        if name == EVALUATION.name and "offload" in fields and fields["offload"].value is None:
            del fields["offload"]  # null keeps it from being inherited; the evaluation has no such field
        marked = {word: fields[word] for word in WORDS if word in fields and fields[word].value == AUTO}
        if marked:
            autos[name] = {word: node.mark for word, node in marked.items()}
            problems += _problems(name, fields, marked)
        new[name] = replace(stage, value=_without(fields, marked))
    tree = replace(root, value={**root.fields, "stages": replace(stages, value=new)})
    return tree, autos, problems


def _without(fields: dict[str, Node], marked: Mapping[str, Node]) -> dict[str, Node]:
    """A stage's fields with the smallest numbers in place of auto that are compatible with the others."""
    needed = {"offload_optimizer": 1, "offload_params": 3}
    required = [zero for field, zero in needed.items() if field in fields and fields[field].value is True]
    numbers: dict[str, Any] = {"zero": max(required, default=0), "micro_batch": 1}
    kept = {key: node for key, node in fields.items() if key not in marked}
    return {**kept, **{key: replace(marked[key], value=numbers[key]) for key in numbers if key in marked}}


def _problems(name: str, fields: dict[str, Node], marked: Mapping[str, Node]) -> list[Problem]:
    problems = []
    batch = fields.get("global_batch")
    if "micro_batch" in marked and name != EVALUATION.name and (batch is None or batch.value is None):
        what = "auto needs global_batch, so that the result does not depend on the GPU's memory"
        problems.append(marked["micro_batch"].mark.problem(what, "set it", f"stages.{name}.micro_batch"))
    for field in OFFLOADS if "offload" in marked else ():
        if field in fields:
            what = "is chosen by offload: auto; remove one of them"
            problems.append(fields[field].place.problem(what, None, f"stages.{name}.{field}"))
    return problems
