"""Inherited settings: top-level Slurm settings, and the evaluation's from the last stage that trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hpc_rlhf.spec.stages import EVALUATION, STAGE_KINDS
from hpc_rlhf.spec.yaml_source import Node

_FROM_TRAINING = ("micro_batch", "zero", "offload", "offload_params", "precision", "slurm")


def inherit(root: Node) -> Node:
    """A spec with all inherited settings filled in. Values of a wrong type are left for the models to report."""
    stages = root.get("stages")
    if stages is None or not stages.fields:
        return root
    filled = dict(stages.fields)
    evaluation = filled.get(EVALUATION.name)
    if evaluation is not None and isinstance(evaluation.value, dict):
        own = evaluation.fields
        filled[EVALUATION.name] = replace(evaluation, value={**_from_training(stages, own), **own})
    base = root.get("slurm")
    if base is not None and isinstance(base.value, dict):
        filled = {name: _with_slurm(stage, base) for name, stage in filled.items()}
    return replace(root, value={**root.fields, "stages": replace(stages, value=filled)})


def _from_training(stages: Node, own: Mapping[str, Node]) -> dict[str, Node]:
    """The settings of the last stage that trains which the evaluation does not set itself."""
    trained = [kind.name for kind in STAGE_KINDS if kind.trains and stages.is_set(kind.name)]
    if not trained:
        return {}
    last = stages.fields[trained[-1]]
    settled = {*own, *(("offload", "offload_params") if "zero" in own else ())}
    return {key: last.fields[key] for key in _FROM_TRAINING if last.is_set(key) and key not in settled}


def _with_slurm(stage: Node, base: Node) -> Node:
    """A stage with its own Slurm settings over the top-level ones."""
    own = stage.get("slurm")
    if own is None or own.value is None:
        own = base
    if not (isinstance(stage.value, dict) and isinstance(own.value, dict)):
        return stage
    slurm = replace(own, value={**base.fields, **own.fields})
    return replace(stage, value={**stage.fields, "slurm": slurm})
