"""What the optimizer gets: matrices decay, vectors do not, frozen weights are left out, nor is a step without end made."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models.engine import parameter_groups
from hpc_rlhf.train.models.lora import adapt
from tests.train import tiny
from tests.train.stages import END, rank_environment


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


RANK = """
import math, torch
from hpc_rlhf.train.runtime.world import join
join(1)
from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.train.models.engine import optimizer_step, training_engine
from hpc_rlhf.train.models.language_model import LanguageModel
from tests.train import tiny

config = {
    "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 0},
}
model = tiny.causal("llama").bfloat16()
engine = training_engine(LanguageModel(model), config, SftSpec(precision="bf16"), 1e-2, 10)

def step(factor):
    return optimizer_step(
        engine, [lambda: engine(torch.tensor([5, 6, 7]), (3,), torch.tensor([1, 2]))[0].sum() * factor]
    )

def weights():
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

before = weights().clone()
assert step(math.inf) == math.inf
assert torch.equal(weights(), before)
assert 0 < step(1.0) < math.inf
assert weights().isfinite().all() and not torch.equal(weights(), before)
"""


@pytest.mark.train
def test_a_step_without_a_finite_gradient_changes_nothing() -> None:
    """DeepSpeed's own look at every gradient is left out; the norm tells."""
    (environment,) = rank_environment(1, free_port())
    ended = subprocess.run(
        [sys.executable, "-c", RANK + END], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
