"""What the optimizer gets: matrices decay, vectors do not, frozen weights are left out."""

from __future__ import annotations

import pytest

from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models.engine import parameter_groups
from hpc_rlhf.train.models.lora import adapt
from tests.train import tiny


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(kind: str) -> None:
    model = tiny.causal(kind)
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in free["params"])
    found = [id(parameter) for group in (decayed, free) for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


def test_frozen_weights_are_left_out() -> None:
    model = tiny.causal("llama")
    adapt(model, LoraSpec(rank=2), seed=1)
    (group,) = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert group["params"]
    assert all(".lora_" in names[id(parameter)] for parameter in group["params"])
