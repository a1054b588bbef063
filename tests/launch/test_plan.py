"""The plan of a spec."""

from __future__ import annotations

import json

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import make_plan
from tests.launch.specs import make_spec


def test_sft_and_reward_run_in_parallel_and_ppo_needs_both() -> None:
    plan = make_plan(make_spec("/scratch/demo"))
    assert {job.stage: job.needs for job in plan.jobs} == {"sft": (), "reward": (), "ppo": ("sft", "reward")}
    seen: set[str] = set()
    for job in plan.jobs:
        assert set(job.needs) <= seen
        seen.add(job.stage)


def test_the_json_has_each_stages_batch_and_settings() -> None:
    spec = make_spec(
        "/scratch/demo",
        sft={"micro_batch": 2, "global_batch": 16, "slurm": {"nodes": 2}},
        reward={"slurm": {"partition": "small"}},
    )
    plan = json.loads(make_plan(spec).to_json())
    sft, reward = plan["jobs"]
    assert sft["batch"] == {"micro": 2, "accumulation": 2, "ranks": 4, "global": 16}
    assert (sft["job_name"], sft["ranks"], reward["ranks"]) == ("demo.sft", 4, 2)
    assert reward["slurm"]["partition"] == "small"


def test_an_uneven_batch_is_refused_with_its_stage() -> None:
    with pytest.raises(HpcRlhfError, match=r"stages\.sft\.global_batch.*multiple of 8") as caught:
        make_plan(make_spec("/scratch/demo", sft={"global_batch": 9}))
    assert caught.value.exit_code == 2
