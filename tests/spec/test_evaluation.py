"""The evaluation in a spec: it depends on all other stages and inherits settings from the last one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec, load_spec, read_spec
from tests.spec.texts import GOOD, problems_in, write

PPO = "ppo: {zero: 3, offload_params: true, precision: fp32, micro_batch: 2, slurm: {nodes: 4}}"


def loaded(tmp_path: Path, evaluation: str, ppo: str = PPO) -> JobSpec:
    head, _, _ = GOOD.partition("  ppo:")
    return load_spec(write(tmp_path, f"{head}  {ppo}\n  eval: {evaluation}\n"))


def test_evaluation_waits_for_all_stages_and_inherits_from_the_last(tmp_path: Path) -> None:
    spec = loaded(tmp_path, "{}")
    assert spec.needs("eval") == spec.trained == ("sft", "reward", "ppo")
    evaluation = spec.stage("eval")
    assert (evaluation.zero, evaluation.offload_params) == (3, True)
    assert (evaluation.precision, evaluation.micro_batch) == ("fp32", 2)
    assert evaluation.slurm == spec.stage("ppo").slurm
    own = loaded(tmp_path, "{zero: 0, slurm: {nodes: 1}}").stage("eval")
    assert (own.zero, own.offload_params, own.precision, own.slurm.nodes, own.slurm.partition) == (
        0,
        False,
        "fp32",
        1,
        "gpu",
    )


def test_inherited_settings_round_trip(tmp_path: Path) -> None:
    spec = loaded(tmp_path, "{}")
    (tmp_path / "kept.yaml").write_text(dump_spec(spec))
    assert read_spec(tmp_path / "kept.yaml") == spec == JobSpec.model_validate(spec.model_dump())


def test_inherited_mistake_is_reported_once(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        loaded(tmp_path, "{}", ppo="ppo: {zero: 7}")
    (problem,) = caught.value.problems
    assert problem.path == "stages.ppo.zero"


def test_evaluation_offload_needs_sharding(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="offload_params needs zero: 3"):
        loaded(tmp_path, "{zero: 2, offload_params: true}")


def test_evaluation_needs_a_trained_stage_and_held_out_data(tmp_path: Path) -> None:
    alone = write(tmp_path, GOOD.partition("stages:")[0] + "stages: {eval: {}}\n")
    assert any("set at least one stage" in problem.what for problem in problems_in(alone))
    dry = write(tmp_path, GOOD.replace("data:\n", "data:\n  held_out: 0\n") + "  eval: {}\n")
    assert [str(problem).partition(": ")[2] for problem in problems_in(dry)] == [
        "data.held_out: leaves the eval stage without data"
    ]
