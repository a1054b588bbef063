"""Inherited settings: top-level Slurm settings, and the evaluation's from the last stage that trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hpc_rlhf.spec.stages import EVALUATION, STAGE_KINDS
from hpc_rlhf.spec.yaml_source import Node

_FROM_TRAINING = ("micro_batch", "zero", "offload", "offload_params", "precision", "slurm")


def inherit(spec: Any) -> Any:
    """A spec with all inherited settings filled in.

    Args:
        spec: plain values, or the nodes of a file, which keep their places. Values of a wrong type are left
            unchanged for the models to report.
    """
    stages = _fields(_fields(spec).get("stages"))
    if not stages:
        return spec
    stages = dict(stages)
    own, last = stages.get(EVALUATION.name), stages.get(_last_trained(stages) or "")
    if _is_mapping(own):
        filled = {**_from_training(_fields(last), _fields(own)), **_fields(own)}
        stages[EVALUATION.name] = _with_fields(own, filled)
    base = _fields(spec).get("slurm")
    if _is_mapping(base):
        stages = {name: _with_slurm(stage, base) for name, stage in stages.items()}
    return _with_fields(spec, {**_fields(spec), "stages": _with_fields(_fields(spec)["stages"], stages)})


def _last_trained(stages: Mapping[str, object]) -> str | None:
    """The last of the given stages that trains."""
    trained = [kind.name for kind in STAGE_KINDS if kind.trains and _value(stages.get(kind.name)) is not None]
    return trained[-1] if trained else None


def _with_slurm(stage: object, base: object) -> object:
    """A stage with its own Slurm settings over the top-level ones."""
    own = _fields(stage).get("slurm")
    if not _is_mapping(stage) or not (own is None or _is_mapping(own)):
        return stage
    slurm = base if own is None else _with_fields(own, {**_fields(base), **_fields(own)})
    return _with_fields(stage, {**_fields(stage), "slurm": slurm})


def _from_training(last: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """The settings of the last stage that trains which the evaluation does not set itself."""
    settled = {*own, *(("offload", "offload_params") if "zero" in own else ())}
    return {key: last[key] for key in _FROM_TRAINING if _value(last.get(key)) is not None and key not in settled}


# Nodes and plain values alike.


def _value(tree: object) -> object:
    return tree.value if isinstance(tree, Node) else tree


def _is_mapping(tree: object) -> bool:
    return isinstance(_value(tree), dict)


def _fields(tree: object) -> dict[str, object]:
    value = _value(tree)
    return value if isinstance(value, dict) else {}


def _with_fields(tree: Any, fields: dict[str, Any]) -> Any:
    return replace(tree, value=fields) if isinstance(tree, Node) else fields
