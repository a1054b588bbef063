"""A model taken apart into stages: each computes its layers of the whole model, or the family is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.division import divide, refusal
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import load_causal
from hpc_rlhf.train.runtime.world import ParallelDims, World
from tests.train import tiny


class OneOf(World):
    """A rank whose others are not here."""

    def largest(self, numbers: Sequence[int]) -> list[int]:
        return list(numbers)


def stage_of(model: Any, place: int, stages: int, dtype: torch.dtype = torch.float32) -> Any:
    """What a stage keeps of a model."""
    packed_attention.enable(model)
    world = OneOf(place, ParallelDims.of(stages, pipeline=stages), torch.device("cpu"), None)
    divide(LanguageModel(model), dtype, world, "it").verify(world, partial(refusal, model, "it"))
    return model


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_neox", "mixtral", "mistral", "phi"])
def test_stages_have_each_weight_once(kind: str) -> None:
    fields: dict[str, Any] = {**tiny.SIZES.get(kind, tiny.SIZES["llama"]), "num_hidden_layers": 3}
    whole = dict(tiny.causal(kind, **fields).named_parameters())
    parts = [dict(stage_of(tiny.causal(kind, **fields), place, 2).named_parameters()) for place in range(2)]
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    assert parts[0].keys() & parts[1].keys() <= {"model.embed_tokens.weight"}
    for part in parts:
        for name, weight in part.items():
            assert torch.equal(weight, whole[name])


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_takes_no_memory_for_the_layers_of_others(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    model = tiny.causal("llama", spread=0.02, **wide).to(stored)
    model.save_pretrained(tmp_path)
    whole = {name: weight.to(dtype) for name, weight in model.named_parameters()}
    size = sum(weight.nbytes for weight in whole.values())
    stage_of(tiny.causal("llama"), 0, 2)  # what the first one loads stays
    before = own_bytes()
    model = load_causal(str(tmp_path), None)
    assert own_bytes() - before < size / 4
    stage = stage_of(model, 1, 2, dtype)
    assert own_bytes() - before < size * 0.7
    assert stage.config.dtype == dtype
    for name, weight in stage.named_parameters():
        assert torch.equal(weight, whole[name])


def scaled() -> Any:
    """A Llama that doubles what its layers get."""
    model = tiny.causal("llama")

    class Scaled(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **others: Any) -> Any:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return super().forward(inputs_embeds=2 * hidden, **others)

    model.model.__class__ = Scaled
    return model


@pytest.mark.parametrize(
    ("model", "stages", "why"),
    [
        (lambda: tiny.causal("llama"), 3, "this one has 2 layers for 3 stages"),
        (lambda: tiny.causal("gpt_oss"), 2, "they cannot run on packed rows"),
        (scaled, 2, "their stages do not compute what the whole model does"),
    ],
)
def test_other_models_are_refused(model: Any, stages: int, why: str) -> None:
    with pytest.raises(HpcRlhfError, match=why):
        stage_of(model(), stages - 1, stages)
