"""The moving average: its closed form in float32, and swapping it in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.checkpoint import shards
from hpc_rlhf.train.checkpoint.shards import Shard
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.models.ema import Ema
from hpc_rlhf.train.models.export import full_weights, module_weights
from hpc_rlhf.train.models.lora import adapt
from hpc_rlhf.train.runtime.world import ParallelDims, World
from tests.train import tiny

BETA = 0.992
ALONE = World(0, ParallelDims(1), torch.device("cpu"), None)


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    model[0].bias.requires_grad = False
    return model


def step(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_matches_its_closed_form_in_float32(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    ema = Ema(model, BETA, ALONE)
    history = [model[0].weight.detach().double().clone()]
    for number in range(50):
        step(model, number)
        ema.update()
        history.append(model[0].weight.detach().double().clone())
    expected = BETA**50 * history[0]
    for number, weight in enumerate(history[1:], 1):
        expected = expected + (1 - BETA) * BETA ** (50 - number) * weight
    assert ema.averages[0].dtype == torch.float32
    torch.testing.assert_close(ema.averages[0].double(), expected, atol=1e-6, rtol=0)


def test_updates_of_less_than_a_hundredth_are_not_lost() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, BETA, ALONE)
    with torch.no_grad():
        model.weight.fill_(1.0 + 2**-7)  # the next number after 1 that bfloat16 has
    in_bfloat16 = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        ema.update()
        in_bfloat16.lerp_(model.weight.detach()[0], 1 - BETA)
    moved = (ema.averages[0].item() - 1) / 2**-7
    assert moved == pytest.approx(1 - BETA**100, rel=1e-3)
    assert in_bfloat16.item() == 1.0, "which is what the average in bfloat16 would have been"


def test_swapped_in_has_the_averages_and_then_restores_the_weights(world: World) -> None:
    model = model_of(torch.bfloat16)
    ema = Ema(model, 0.5, world)
    step(model, 1)
    ema.update()
    own = [parameter.detach().clone() for parameter in model.parameters()]
    with ema.averaged_weights():
        assert torch.equal(model[0].weight, ema.averages[0].bfloat16())
        assert not torch.equal(model[0].weight, own[0])
        assert torch.equal(model[0].bias, own[1]), "not trained, so not averaged"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own, strict=True))
    with pytest.raises(KeyError), ema.averaged_weights():
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own, strict=True))


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("only", [True, False])
def test_of_adapters_the_update_is_averaged(kind: str, only: bool, world: World, tmp_path: Path) -> None:
    """The product of the averaged factors is another matrix."""
    model = tiny.causal(kind)
    adapt(model, LoraSpec(rank=3, alpha=6.0, only=only), seed=1)
    ema = Ema(model, 0.6, world)
    expected = exported(model)
    for number in range(4):
        step(model, number)
        ema.update()
        expected = {name: expected[name].lerp(weight, 0.4) for name, weight in exported(model).items()}
    own = exported(model)
    with ema.averaged_weights():
        averaged = exported(model)
    for name, weight in averaged.items():
        torch.testing.assert_close(weight.double(), expected[name], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, own[name]) for name, weight in exported(model).items())
    snapshot = Snapshot(tmp_path)
    ema.save(snapshot, "ema")
    snapshot.write()
    other = Ema(model, 0.6, world)
    other.load(tmp_path / "ema")
    with other.averaged_weights():
        assert all(torch.equal(weight, averaged[name]) for name, weight in exported(model).items())


def exported(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.double() for name, weight in full_weights(module_weights(model))}


def test_averages_of_factors_that_an_earlier_version_kept_are_read(world: World, tmp_path: Path) -> None:
    model = tiny.causal("llama")
    adapt(model, LoraSpec(rank=3, only=False), seed=1)
    step(model, 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    snapshot = Snapshot(tmp_path)
    pieces = [Shard(str(i), 0, parameter.detach().float().view(-1)) for i, parameter in enumerate(trained)]
    shards.write(snapshot, "ema", pieces, {}, world)
    snapshot.write()
    expected = exported(model)
    step(model, 2)
    ema = Ema(model, 0.6, world)
    ema.load(tmp_path / "ema")
    with ema.averaged_weights():
        for name, weight in exported(model).items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)


def test_ranks_together_keep_every_average_once() -> None:
    model = model_of(torch.float32)
    kept = [
        set(Ema(model, BETA, World(rank, ParallelDims(2), torch.device("cpu"), None)).averages) for rank in range(2)
    ]
    assert kept[0] | kept[1] == {0, 1, 2}
    assert not kept[0] & kept[1]


def test_averages_resume_bit_for_bit(tmp_path: Path, world: World) -> None:
    model = model_of(torch.bfloat16)
    ema = Ema(model, BETA, world)
    step(model, 1)
    ema.update()
    snapshot = Snapshot(tmp_path)
    ema.save(snapshot, "ema")
    snapshot.write()
    other = Ema(model, BETA, world)
    assert not torch.equal(other.averages[0], ema.averages[0])
    other.load(tmp_path / "ema")
    assert other.averages.keys() == ema.averages.keys()
    assert all(torch.equal(other.averages[i], ema.averages[i]) for i in ema.averages)
