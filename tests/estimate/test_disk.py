"""Disk space of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.estimate.disk import run_bytes
from hpc_rlhf.spec.job import JobSpec
from tests.launch.specs import make_spec


def of_actor(actor: object) -> JobSpec:
    spec = make_spec("/scratch/demo", sft={})
    return JobSpec.model_validate({**spec.model_dump(mode="json"), "models": {"actor": actor}})


def gigabytes(actor: object) -> float:
    return (run_bytes(of_actor(actor)) or 0) / 1e9


def test_a_folders_files_count_before_a_number_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "opt-13b-distilled"
    folder.mkdir()
    assert gigabytes(str(folder)) > 300  # only its name is known
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(250_000_000)
    assert 2 < gigabytes(str(folder)) < 10


def test_a_configuration_counts_first(tmp_path: Path) -> None:
    folder = tmp_path / "opt-13b-distilled"
    folder.mkdir()
    fields = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500, **fields}))
    assert gigabytes(str(folder)) < 0.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path))
        assert run_bytes(of_actor("nobody/knows-this")) is None
        assert gigabytes("nobody/knows-this-1b") > 20


def test_checkpoints_and_models_of_every_stage_count() -> None:
    def billions(**stages: dict[str, Any]) -> float:
        spec = make_spec("/scratch/demo", **stages).model_dump(mode="json")
        spec["models"] = {"actor": "facebook/opt-1.3b", "reward": "facebook/opt-350m"}
        return (run_bytes(JobSpec.model_validate(spec)) or 0) / 1e9

    # Two checkpoints and one being written, of 12 bytes a weight, and a model of 2.
    actor, reward = 1.316, 0.331
    assert billions(sft={}) == pytest.approx(actor * (3 * 12 + 2), rel=0.01)
    assert billions(sft={"lora": {"rank": 8}}) < 7
    best = {"eval_every": 0.1, "keep_best": "loss"}
    assert billions(sft=best) == pytest.approx(actor * (3 * 14 + 2), rel=0.01)
    assert billions(reward={}, ppo={}) == pytest.approx(reward * 38 + ((actor + reward) * 36 + actor * 2), rel=0.01)
