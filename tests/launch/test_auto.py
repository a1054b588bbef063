"""Resolving `auto`: the fastest combination that fits, chosen once for a run."""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rlhf.errors import HpcRlhfError, SpecError
from hpc_rlhf.estimate.stage_memory import stage_memory
from hpc_rlhf.estimate.step_time import step_parts
from hpc_rlhf.launch import auto
from hpc_rlhf.launch.auto import Choice, choose, load, resolve
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.spec.job import JobSpec, json_schema
from hpc_rlhf.spec.load import load_spec, read_spec
from hpc_rlhf.spec.sweep import Sweep
from tests.launch.specs import make_spec

GPU = {"gpu": "a100-40g", "gpus_per_node": 4}


def write(path: Path, **stages: dict[str, Any]) -> Path:
    fields = {
        "name": "auto", "run_dir": str(path / "run"), "slurm": GPU,
        "data": {"sources": [{"demo": 100}], "max_prompt_tokens": 256, "max_answer_tokens": 256, "held_out": 0.1},
        "models": {"actor": "facebook/opt-1.3b", "reward": "facebook/opt-350m"}, "stages": stages,
    }  # fmt: skip
    (path / "job.yaml").write_text(yaml.safe_dump(fields))
    return path / "job.yaml"


def all_auto(**fields: Any) -> dict[str, Any]:
    return {"zero": "auto", "micro_batch": "auto", "offload": "auto", "global_batch": 32, **fields}


def prepared(spec: JobSpec) -> JobSpec:
    with claim(spec, "a test") as run:
        prepare(spec, run)
    return read_spec(run.job_yaml)


def by_hand(spec: JobSpec) -> tuple[float, dict[str, Any]]:
    """The fastest SFT of all that fit, by trying every combination."""
    steps = []
    for zero, micro, optimizer, params in product(range(4), (1, 2, 4, 8), (False, True), (False, True)):
        fields = {"zero": zero, "micro_batch": micro, "offload_optimizer": optimizer, "offload_params": params}
        if (params and zero != 3) or (optimizer and not zero):
            continue
        tried = spec.with_stages(sft=fields)
        if stage_memory(tried, "sft").fits:
            steps.append((sum(step_parts(tried, "sft").values()), fields))
    return min(steps, key=lambda pair: pair[0])


@pytest.mark.parametrize("gpu", ["a100-80g", "a100-40g", "a10-24g", "v100-16g"])
def test_the_choice_equals_an_exhaustive_search(gpu: str, tmp_path: Path) -> None:
    file = write(tmp_path, sft=all_auto())
    spec, (choice,) = resolve(load_spec(file, [f"slurm.gpu={gpu}"]))
    seconds, _ = by_hand(spec)
    assert sum(step_parts(spec, "sft").values()) <= 1.01 * seconds
    assert stage_memory(spec, "sft").fits
    assert len(choice.considered) == 4 * (1 + 2 + 2 + 4)
    assert spec.autos == {}


def test_an_evaluation_without_offload_has_none(tmp_path: Path) -> None:
    file = write(tmp_path, sft={"offload": None}, eval={})
    assert load_spec(file).stages.eval is not None
    file = write(tmp_path, sft={}, eval={"offload": True})
    with pytest.raises(SpecError, match=r"stages.eval.offload: is not a field"):
        load_spec(file)


def test_the_simplest_of_equal_combinations_wins() -> None:
    spec = make_spec("/scratch/demo", {"gpu": "h100-80g", "gpus_per_node": 1}, sft={"global_batch": 8})
    fields = choose(spec, "sft", {"zero": None, "offload": None}).fields
    assert fields == {"zero": 0, "offload_optimizer": False, "offload_params": False}


def test_a_smaller_gpu_is_never_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc_rlhf.spec import gpus

    file = write(tmp_path, sft=all_auto())
    steps = []
    for gib in range(5, 80, 3):
        same = gpus.GPUS["a100-80g"].__dict__ | {"gib": float(gib)}
        monkeypatch.setitem(gpus.GPUS, "made-up", gpus.Gpu(**same))
        try:
            spec, _ = resolve(load_spec(file, ["slurm.gpu=made-up"]))
        except SpecError:
            steps.append(math.inf)
        else:
            steps.append(sum(step_parts(spec, "sft").values()))
    assert all(after <= 1.01 * before for before, after in pairwise(steps))
    assert len(set(steps)) >= 4, "several sizes make a difference"


def test_frozen_models_are_offloaded_before_trained_ones_are_sharded(tmp_path: Path) -> None:
    ppo = all_auto(lora={"rank": 64}, activation_checkpointing=True)
    file = write(tmp_path, reward={}, ppo=ppo)
    spec, (choice,) = resolve(load_spec(file, ["models.actor=facebook/opt-13b", "slurm.gpu=a100-80g"]))
    assert {"offload_optimizer", "offload_params", "offload_frozen"} < set(choice.fields)
    assert stage_memory(spec, "ppo").fits


def test_the_evaluation_follows_the_last_stage_that_trains(tmp_path: Path) -> None:
    file = write(tmp_path, sft=all_auto(), eval={})
    spec, _ = resolve(load_spec(file, ["models.actor=facebook/opt-13b", "slurm.gpu=a10-24g"]))
    assert spec.stages.sft is not None
    assert spec.stages.eval is not None
    assert spec.stages.sft.zero == 3
    assert (spec.stages.eval.zero, spec.stages.eval.micro_batch) == (3, spec.stages.sft.micro_batch)
    assert spec.stages.eval.offload_params == spec.stages.sft.offload_params


@pytest.mark.parametrize(
    ("fields", "sets", "message"),
    [
        ({"zero": "auto"}, ["slurm.gpu=80G"], "stages.sft.zero: auto needs the name of the GPU"),
        ({"zero": "auto"}, ["slurm.gpus_per_node=0", "slurm.ranks_per_node=2"], "stages.sft.zero: auto needs GPUs"),
        ({"micro_batch": "auto"}, [], "stages.sft.micro_batch: auto needs global_batch"),
        ({"offload": "auto", "offload_params": False}, [], "stages.sft.offload_params: is chosen by offload: auto"),
        ({"offload": "yes"}, [], "stages.sft.offload: must be"),
        ({"zero": "automatic"}, [], "stages.sft.zero: must be"),
        ({"zero": "auto"}, ["models.actor=nobody/knows"], "hpc-rlhf prefetch"),
        (all_auto(), ["data.max_prompt_tokens=500000", "slurm.gpu=v100-16g"], "nothing fits"),
    ],
)  # fmt: skip
def test_an_impossible_choice_is_reported_with_its_line(
    fields: dict[str, Any], sets: list[str], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path, sft=fields)
    with pytest.raises(SpecError) as error:
        load(file, sets)
    assert message in str(error.value)
    problem = error.value.problems[0]
    assert problem.line, "it has a place in the file"


def test_a_run_keeps_what_it_was_prepared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, sft=all_auto(), eval={})
    first = load(file)
    assert isinstance(first, JobSpec)
    kept = prepared(first)
    assert kept.stages == first.stages
    # Later the estimates are others.
    monkeypatch.setattr(auto, "step_parts", lambda spec, name: {"": 1.0 / (1 + spec.stage(name).zero)})
    choices: list[Choice] = []
    again = load(file, [], choices.append)
    assert isinstance(again, JobSpec)
    assert again.stages == first.stages
    assert "prepared" in choices[0].why
    prepared(again)
    # Another run, or another spec for this one that has not trained yet, gets a new choice.
    assert load(file, ["seed=5"]).stages != first.stages  # type: ignore[union-attr]
    # What only says where it runs does not make it another spec.
    moved = load(file, ["slurm.partition=other"])
    assert isinstance(moved, JobSpec)
    assert moved.stages.sft is not None
    assert first.stages.sft is not None
    assert moved.stages.sft.zero == first.stages.sft.zero


def test_auto_is_resolved_in_every_run_of_a_sweep(tmp_path: Path) -> None:
    file = write(tmp_path, sft=all_auto())
    sweep = load(file, ["sweep={stages.sft.lr: [0.1, 0.2], seed: [1, 2]}"])
    assert isinstance(sweep, Sweep)
    assert [member.spec.autos for member in sweep.members] == [{}] * 4
    assert len({member.spec.stage("sft").micro_batch for member in sweep.members}) == 1


def test_a_sweep_may_compare_auto_with_a_number(tmp_path: Path) -> None:
    file = write(tmp_path, sft=all_auto())
    sweep = load(file, ["sweep={stages.sft.zero: [auto, 3]}"])
    assert isinstance(sweep, Sweep)
    assert [member.spec.stage("sft").zero for member in sweep.members][1] == 3


def test_the_schema_allows_auto() -> None:
    fields = json_schema()["$defs"]["SftSpec"]["properties"]
    for name in ("zero", "micro_batch", "offload"):
        assert any(kind.get("const") == "auto" for kind in fields[name]["anyOf"]), name


def test_a_spec_without_auto_is_unchanged() -> None:
    spec = make_spec("/scratch/demo", sft={})
    assert resolve(spec) == (spec, [])


def test_an_unknown_model_is_reported() -> None:
    spec = make_spec("/scratch/demo", GPU, sft={"global_batch": 16})
    models = spec.models.model_copy(update={"actor": "nobody/knows"})
    with pytest.raises(HpcRlhfError, match="not in the hub cache"):
        choose(spec.model_copy(update={"models": models}), "sft", {"zero": None})
