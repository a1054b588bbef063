"""Families of models against transformers. A few here; `make models` tries all of them and writes docs/models.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.stages.sft import SftSpec
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.common import prepare_model
from tests.models import table
from tests.models.checks import check
from tests.models.families import FAMILIES
from tests.train import tiny

# Experts whose inputs come first, a router that thresholds by its noise, and a multimodal model.
FEW = ("gpt_oss", "phimoe", "gemma3")


@pytest.mark.parametrize("name", FEW)
def test_a_family_computes_what_transformers_computes(name: str, world: World, tmp_path: Path) -> None:
    outcome = check(FAMILIES[name], tmp_path)
    assert (outcome.refused, outcome.wrong) == ("", {})


def test_activation_checkpointing_is_refused_where_a_model_lacks_it() -> None:
    model = tiny.causal("ctrl", n_embd=32, n_layer=2, n_head=4, dff=48)
    with pytest.raises(HpcRlhfError, match="ctrl models cannot recompute activations"):
        prepare_model(model, SftSpec(lr=1e-4, activation_checkpointing=True), seed=1)


def test_the_page_has_a_verdict_on_every_family() -> None:
    rows = [line for line in table.PAGE.read_text(encoding="utf-8").splitlines() if "| `" in line]
    assert [re.findall(r"\| `(.*?)` \|", line)[0] for line in rows] == list(FAMILIES)
    assert all(re.search(r"\| (works|refused)\b", line) for line in rows)
