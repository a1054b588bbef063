"""The score head of reward model and critic: in float32, while the rest of the model is in half precision.

bfloat16 would round a score of 6 to a multiple of 1/32, and lose updates of the head that are smaller than a 256th of a
weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_rlhf.train.parallel import deepspeed_internals as internals

WEIGHT = "score.weight"


class ScoreHead(nn.Linear):
    """A linear layer without bias that computes in float32.

    DeepSpeed keeps all parameters in one half precision and steps float32 copies of them. The layer uses that copy of
    its weight instead of the parameter, which only receives the gradient.

    Attributes:
        exact: (1, hidden), float32; the weight that the parameter was rounded from. None if there is no other.
    """

    exact: Tensor | None = None

    def float_weight(self) -> Tensor:
        """The weight, float32, with its gradient; ZeRO-3 shards must have been gathered."""
        weight = self.weight.float()
        if self.exact is None or self.weight.dtype == torch.float32:
            return weight
        self.exact = self.exact.to(weight.device)
        # Where it does not round to the weight, another weight was put in place.
        exact = torch.where(self.exact.to(self.weight.dtype) == self.weight, self.exact, weight)
        return weight + (exact - weight).detach()  # without rounding

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.float_weight())


def stored(folder: Path | None, weight_name: str) -> Tensor | None:
    """The score head in a model's folder as float32; None if it is bfloat16, of which no precision loses anything."""
    from safetensors import safe_open

    if folder is None:
        return None
    index = folder / "model.safetensors.index.json"
    name = json.loads(index.read_text())["weight_map"].get(weight_name, "") if index.exists() else "model.safetensors"
    if not (folder / name).is_file():
        return None
    with safe_open(folder / name, framework="pt") as file:
        weight: Tensor | None = file.get_tensor(weight_name) if weight_name in file.keys() else None  # noqa: SIM118
    return weight.float() if weight is not None and weight.dtype != torch.bfloat16 else None


def write_masters(engine: Any) -> None:
    """Let training start from the exact weights: DeepSpeed has made its float32 copies from the rounded ones."""
    for name, head in _half_precision(engine):
        for fragment in internals.fragments(engine):
            if fragment.name == name and head.exact is not None:
                master = fragment.of(fragment.stepped)
                master.copy_(head.exact.view(-1)[fragment.start : fragment.start + len(master)])


def read_masters(engine: Any) -> None:
    """Give the heads of an engine the float32 weights that its optimizer steps. Collective."""
    for name, head in _half_precision(engine):
        whole = torch.zeros(internals.full_shape(head.weight), device=engine.device)
        for fragment in internals.fragments(engine):
            if fragment.name == name:
                master = fragment.of(fragment.stepped)
                whole.view(-1)[fragment.start : fragment.start + len(master)] = master
        if engine.zero_optimization_stage():
            group = None if internals.tensor_parallel_group(engine) is None else internals.replica_group()
            dist.all_reduce(whole, group=group)
        head.exact = whole


def _half_precision(engine: Any) -> Iterator[tuple[str, ScoreHead]]:
    for name, module in engine.module.named_modules():
        if isinstance(module, ScoreHead) and module.weight.dtype != torch.float32:
            yield f"{name}.weight", module
