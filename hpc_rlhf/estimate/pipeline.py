"""The stages of a pipeline: what each has of a model, and the micro-batches whose activations it keeps at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.parameters import Architecture
from hpc_rlhf.spec.pipeline import stage_bounds


@dataclass(frozen=True)
class Share:
    """A stage's share of a model.

    Attributes:
        model: its layers, and the embeddings or the output head.
        in_flight: micro-batches whose activations it keeps at a time.
    """

    model: Architecture
    in_flight: int
    is_last: bool


def shares(model: Architecture, stages: int, passes: int) -> Iterator[Share]:
    """The stages of a model; all layers count alike.

    Args:
        passes: micro-batches of a step.

    Raises:
        HpcRlhfError: there are more stages than layers.
    """
    if stages > model.layers:
        what = f"the model's {model.layers} layers cannot be divided into {stages} stages"
        raise HpcRlhfError(what, where="pipeline_parallel", hint=f"use at most {model.layers}")
    embedding = model.vocabulary * model.hidden
    layer = (model.parameters - model.head - embedding) // model.layers
    head = model.head or embedding  # the last stage has a copy of tied embeddings
    bounds = stage_bounds([layer] * model.layers, embedding, head, stages)
    for place, (start, stop) in enumerate(pairwise(bounds)):
        is_last, count = place == stages - 1, stop - start
        part = count / model.layers
        own = replace(
            model, parameters=count * layer + embedding * (place == 0) + head * is_last, layers=count,
            inside=int(part * model.inside), chunked=int(part * model.chunked),
            kept=_scaled(model.kept, part), kept_in_mlps=_scaled(model.kept_in_mlps, part),
        )  # fmt: skip
        yield Share(own, min(stages - place, passes), is_last)


def _scaled(kept: Mapping[int, tuple[float, float]], part: float) -> dict[int, tuple[float, float]]:
    return {item: (part * whole, part * sharded) for item, (whole, sharded) in kept.items()}
