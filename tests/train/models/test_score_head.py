"""The score head is float32 in a half-precision model: computed, trained, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.models.language_model import RewardModel
from hpc_rlhf.train.models.loading import load_reward
from hpc_rlhf.train.models.score_head import ScoreHead
from hpc_rlhf.train.ragged import Ragged
from tests.train import tiny
from tests.train.stages import log_tail, make_run, run_stage, tiny_spec

BATCH = Ragged.of([[5, 6, 7, tiny.EOS], [9], [8, 30, 31, 32, 33, 34, tiny.EOS]])
KINDS = ("llama", "opt", "gpt2")


def reward_folder(kind: str, path: Path, dtype: torch.dtype) -> Path:
    """A reward model's folder with a head of high scores in float32, the rest in a precision."""
    model = tiny.classifier(kind).to(dtype)
    model.save_pretrained(path)
    state = load_file(path / "model.safetensors")
    torch.manual_seed(3)
    state["score.weight"] = torch.randn(state["score.weight"].shape) * 4
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_values_in_half_precision_are_the_float32_heads(kind: str, tmp_path: Path) -> None:
    model = load_reward(str(reward_folder(kind, tmp_path, torch.bfloat16)), torch.bfloat16, None).eval()
    head = load_file(tmp_path / "model.safetensors")["score.weight"]
    hidden: list[torch.Tensor] = []
    model.classifier.score.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    values = model(BATCH.ids, BATCH.lengths)
    assert (values.dtype, hidden[0].dtype) == (torch.float32, torch.bfloat16)
    expected = (hidden[0].double() @ head.double().T).squeeze(-1)[: len(BATCH.ids)]
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)
    assert (values - values.bfloat16().float()).abs().max() > 1e-3, "which bfloat16 would lose"


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_saved_in_float32_and_read_again(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = reward_folder(kind, tmp_path / "first", torch.bfloat16)
    model = load_reward(str(folder), torch.bfloat16, None)
    export(model.classifier, tiny.tokenizer(), tmp_path / "again", is_main=True)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert torch.equal(again["score.weight"], first["score.weight"])
    assert {weight.dtype for name, weight in again.items() if name != "score.weight"} == {torch.bfloat16}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").num_labels == 1


@torch.no_grad()
def test_a_head_in_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    tiny.classifier("llama").bfloat16().save_pretrained(tmp_path)
    model = load_reward(str(tmp_path), torch.bfloat16, None)
    assert torch.equal(model.classifier.score.float_weight(), model.classifier.score.weight.float())


def test_a_weight_put_in_place_is_used() -> None:
    model = RewardModel(tiny.classifier("llama").bfloat16(), torch.full((1, 32), 0.123456))
    head = model.classifier.score
    assert isinstance(head, ScoreHead)
    with torch.no_grad():
        head.weight.fill_(0.123456)
        assert torch.equal(head.float_weight(), torch.full((1, 32), 0.123456))
        head.weight[0, 3] = 2.0
        assert head.float_weight()[0, 2:5].tolist() == pytest.approx([0.123456, 2.0, 0.123456], rel=1e-7)
    head.float_weight().sum().backward()
    assert torch.equal(head.weight.grad, torch.ones_like(head.weight))


@pytest.mark.train
@pytest.mark.parametrize("fields", [{"zero": 0}, {"zero": 2}, {"zero": 3}], ids=lambda fields: f"zero {fields['zero']}")
def test_updates_too_small_for_half_precision_are_learned_and_handed_on(fields: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tiny_spec(tmp_path, reward={**fields, "precision": "bf16", "lr": 1e-6, "max_steps": 3}))
    assert run_stage(run, "reward", 2) == [0, 0], log_tail(run, "reward")
    state = load_file(run.stage("reward").model / "model.safetensors")
    head = state["score.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    initial = initial_head(run)
    moved = (head - initial).abs()
    assert 0 < moved.max() < 1e-5, "three steps of Adam"
    assert (moved > 0).float().mean() > 0.9


def initial_head(run: RunDir) -> torch.Tensor:
    folder = run.stage("reward").path / "initial"
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 32
    exact = load_reward(str(folder), torch.bfloat16, seed=7).classifier.score.exact
    assert exact is not None
    return exact
