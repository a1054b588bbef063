"""Rewards that cannot be computed are refused by ``check``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec


def load(folder: Path, *rewards: dict[str, object], **slurm: object) -> JobSpec:
    grpo = {"rewards": list(rewards), "slurm": slurm, "group_size": 4}
    spec = {"name": "checked", "run_dir": "runs", "models": {"actor": "some/model"}, "stages": {"grpo": grpo}}
    spec["data"] = {"sources": [{"path": "some/data", "format": "prompt"}]}
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    return load_spec(folder / "job.yaml")


@pytest.mark.parametrize(
    ("reward", "package", "extra"),
    [({"math": "answer"}, "math_verify", "math"), ({"reasoning_gym": True}, "reasoning_gym", "gym")],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: dict[str, object], package: str, extra: str
) -> None:
    load(tmp_path, reward)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(SpecError) as caught:
        load(tmp_path, {"format": "a"}, reward)
    (problem,) = caught.value.problems
    assert problem.path == "stages.grpo.rewards.1"
    assert problem.what == f"needs the package {package}, which is not installed"
    assert problem.hint == f"pip install 'hpc-rlhf[{extra}]'"
    load(tmp_path, reward, container={"runtime": "apptainer", "image": "x.sif"})


def test_a_reward_model_is_found_beside_the_spec_or_on_the_hub(tmp_path: Path) -> None:
    for name, kind in {"judge": "SequenceClassification", "actor": "CausalLM"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": [f"LlamaFor{kind}"]}))
    spec = load(tmp_path, {"model": "./judge"}, {"model": "some/reward"}, {"code": "tests", "image": "py.sif"})
    rewards = spec.stage("grpo").rewards  # type: ignore[attr-defined]
    assert [rewards[0].model, rewards[2].image] == [str(tmp_path / "judge"), str(tmp_path / "py.sif")]
    assert [item.name for item in hub.items(spec) if item.kind == "model"] == ["some/model", "some/reward"]
    with pytest.raises(SpecError, match="it is no reward model"):
        load(tmp_path, {"model": "./actor"})
    with pytest.raises(SpecError, match="there is no file or folder"):
        load(tmp_path, {"model": "./missing"})
