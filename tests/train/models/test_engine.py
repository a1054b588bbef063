"""Engines: which parameters decay and which are trained, and steps with an infinite gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models import engine
from hpc_rlhf.train.models.engine import parameter_groups, training_engine
from hpc_rlhf.train.models.lora import adapt
from tests.train import tiny
from tests.train.ranks import start, wait


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(kind: str) -> None:
    model = tiny.causal(kind)
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in free["params"])
    grouped = [id(parameter) for group in (decayed, free) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_frozen_weights_are_left_out() -> None:
    model = tiny.causal("llama")
    adapt(model, LoraSpec(rank=2), seed=1)
    (group,) = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert group["params"]
    assert all(".lora_" in names[id(parameter)] for parameter in group["params"])


RANK = """
import math, sys, torch
from hpc_rlhf.train.runtime.world import join
join(1)
from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.train.models.engine import learning_rate, optimizer_step, training_engine
from hpc_rlhf.train.models.language_model import LanguageModel
from tests.benchmarks.allocations import Allocations
from tests.train import tiny

stage, optimizer = int(sys.argv[1]), sys.argv[2]
config = {
    "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "gradient_clipping": 1.0,
    "zero_optimization": {"stage": stage},
}
model = tiny.causal("llama").bfloat16()
spec = SftSpec(precision="bf16", zero=stage, optimizer=optimizer, warmup=5)
engine = training_engine(LanguageModel(model), config, spec, 1e-2, 10)

def step(factor):
    return optimizer_step(
        engine, [lambda: engine(torch.tensor([5, 6, 7]), (3,), torch.tensor([1, 2]))[0].sum() * factor]
    )

def weights():
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

first = step(1.0)
assert first.applied and 0 < first.grad_norm < math.inf and first.metrics["skipped"] == 0.0
before, rate = weights().clone(), learning_rate(engine)
skipped = step(math.inf)
assert not skipped.applied
# DeepSpeed's norm is still that of the step before.
assert skipped.metrics == {"grad_norm": math.inf, "skipped": 1.0}
assert torch.equal(weights(), before)
assert learning_rate(engine) == rate, "the schedule counts steps that were made"
again = step(1.0)
assert again.applied and 0 < again.grad_norm < math.inf
assert weights().isfinite().all() and not torch.equal(weights(), before)
assert learning_rate(engine) > rate
for _ in range(7):
    step(1.0)
assert learning_rate(engine) < 1e-9, "the schedule ends with the tenth step, although one was skipped"

if stage == 0:
    loss = engine(torch.tensor([5, 6, 7]), (3,), torch.tensor([1, 2]))[0].sum()
    with Allocations() as meter:
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(loss)
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    assert meter.peak < 2 * gradients, "a single rank copies no gradients to sum them"
"""


@pytest.mark.train
@pytest.mark.parametrize(("stage", "optimizer"), [("0", "adamw"), ("0", "onebit-adam"), ("1", "adamw"), ("2", "adamw")])
def test_a_step_with_an_infinite_gradient_is_skipped_and_reported(tmp_path: Path, stage: str, optimizer: str) -> None:
    log = tmp_path / "log"
    wait(start(["-c", RANK, stage, optimizer], [log]), [log])


def test_float16_on_a_device_without_it_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "supports_fp16", lambda: False)
    config = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    with pytest.raises(HpcRlhfError, match="cannot train in float16") as caught:
        training_engine(tiny.causal("llama"), config, SftSpec(precision="fp16"), 1e-3, 10)
    assert caught.value.exit_code == 2
    assert "bf16" in str(caught.value)
