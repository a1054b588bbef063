"""Rewards that cannot be computed are refused by ``check``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rlhf.errors import Problem, SpecError
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec


def load(
    folder: Path, *rewards: dict[str, object], fields: dict[str, object] | None = None, **slurm: object
) -> JobSpec:
    grpo = {"rewards": list(rewards), "slurm": slurm, "group_size": 4, **(fields or {})}
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
        fields = {"architectures": [f"LlamaFor{kind}"], "num_labels": 1}
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    (tmp_path / "py.sif").touch()
    spec = load(tmp_path, {"model": "./judge"}, {"model": "some/reward"}, {"code": "tests", "image": "py.sif"})
    rewards = spec.stage("grpo").rewards  # type: ignore[attr-defined]
    assert [rewards[0].model, rewards[2].image] == [str(tmp_path / "judge"), str(tmp_path / "py.sif")]
    assert [item.name for item in hub.items(spec) if item.kind == "model"] == ["some/model", "some/reward"]
    with pytest.raises(SpecError, match="it is no reward model"):
        load(tmp_path, {"model": "./actor"})
    with pytest.raises(SpecError, match="there is no file or folder"):
        load(tmp_path, {"model": "./missing"})


def refused(folder: Path, *rewards: dict[str, object], **settings: Any) -> Problem:
    with pytest.raises(SpecError) as caught:
        load(folder, *rewards, **settings)
    (problem,) = caught.value.problems
    assert problem.line
    assert problem.hint
    return problem


def test_code_needs_an_image_that_exists(tmp_path: Path) -> None:
    for image in ("py.sif", "images/py"):
        problem = refused(tmp_path, {"format": "a"}, {"code": "tests", "image": image})
        assert problem.path == "stages.grpo.rewards.1.image"
        assert str(tmp_path / image) in problem.what
    (tmp_path / "images/py").mkdir(parents=True)
    for image in ("images/py", "docker://python:3.12-slim"):
        load(tmp_path, {"code": "tests", "image": image})
    load(tmp_path, {"code": "tests", "image": "/inside/py.sif"}, container={"runtime": "apptainer", "image": "x.sif"})


@pytest.mark.parametrize("fields", [{}, {"num_labels": 2}, {"id2label": {"0": "good", "1": "bad"}, "num_labels": 1}])
def test_a_reward_model_has_one_label(tmp_path: Path, fields: dict[str, object]) -> None:
    (tmp_path / "judge").mkdir()
    config = {"architectures": ["LlamaForSequenceClassification"], **fields}
    (tmp_path / "judge/config.json").write_text(json.dumps(config))
    problem = refused(tmp_path, {"model": "./judge"})
    assert (problem.path, problem.what) == ("stages.grpo.rewards.0.model", "it scores 2 labels, one is needed")


def test_the_penalty_of_long_responses_grows_within_them(tmp_path: Path) -> None:
    fields = {"overlong": "penalty", "overlong_margin": 257}
    problem = refused(tmp_path, {"format": "a"}, fields=fields)
    assert problem.path == "stages.grpo.overlong_margin"
    assert "is 257, but responses have at most 256 tokens" in problem.what
    load(tmp_path, {"format": "a"}, fields={**fields, "overlong_margin": 256})
