"""Ranks started by torchrun and by DeepSpeed's launcher save when preempted, and resume to the same
weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates, render
from tests.cluster import Cluster
from tests.cluster.chain import Chain, assert_went_on_once, run_preempted
from tests.cluster.cluster import CHECKOUT
from tests.launch.specs import make_spec

CHAIN = CHECKOUT / "tests/cluster/jobs/chain.yaml"
NODES = {"torchrun": "node[1-2]", "deepspeed": "node[3-4]"}


@pytest.mark.parametrize(
    ("kind", "cpus"), [("srun", 6), ("torchrun", 6), ("deepspeed", 6), ("serve", 6), ("doctor", 3)]
)
def test_a_step_is_given_all_cpus_of_its_ranks(idle_cluster: Cluster, tmp_path: Path, kind: str, cpus: int) -> None:
    """Two ranks of three CPUs each, by tasks of their own or by one task for the node."""
    settings = {"cpus_per_gpu": 3, "launcher": kind if kind in NODES else "srun", "partition": "high"}
    plan = make_plan(make_spec(tmp_path / "run", settings, sft={}))
    render(plan, plan.run.scripts)
    plan.run.stage("sft").logs.mkdir(parents=True)
    job, templates, out = plan.jobs[0], Templates(), tmp_path / "step"
    command = f"bash -c 'scontrol --oneliner show step $SLURM_JOB_ID.$SLURM_STEP_ID >{out}'"
    if kind == "serve":
        text = templates.serve(plan, job, command)
    elif kind == "doctor":
        (tmp_path / "spec.yaml").touch()
        text = templates.doctor(plan, job, tmp_path, command, 77)
    else:
        text = templates.script(plan, job, command)
    script = tmp_path / "script"
    script.write_text(text)
    idle_cluster.wait_state(idle_cluster.sbatch("--output=/dev/null", script), "COMPLETED")
    assert f" CPUs={cpus} " in out.read_text()


@pytest.fixture(scope="module")
def chains(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chain]:
    folder = tmp_path_factory.mktemp("launchers")
    alone = ("stages.reward=null", "stages.ppo=null", "slurm.partition=low")
    return {
        launcher: Chain(
            cluster, CHAIN, folder / launcher, (*alone, f"slurm.launcher={launcher}", f"slurm.nodelist={nodes}")
        )
        for launcher, nodes in NODES.items()
    }


@pytest.fixture(scope="module")
def models(chains: dict[str, Chain]) -> dict[str, dict[str, Any]]:
    """The results of both, run at once on separate nodes."""
    with ThreadPoolExecutor(len(chains)) as pool:
        done = {name: pool.submit(run_preempted, chain, NODES[name]) for name, chain in chains.items()}
        return {name: future.result() for name, future in done.items()}


@pytest.mark.parametrize("launcher", NODES)
def test_preempted_ranks_save_and_resume(
    chains: dict[str, Chain], models: dict[str, dict[str, Any]], launcher: str
) -> None:
    assert_went_on_once(chains[launcher], 2)


@pytest.mark.parametrize("launcher", NODES)
def test_each_rank_has_its_own_logs(chains: dict[str, Chain], models: dict[str, dict[str, Any]], launcher: str) -> None:
    chain = chains[launcher]
    logs: Path = chain.run.stage("sft").logs
    job = chain.job_id("sft")
    assert {path.name for path in logs.glob("*_log.*")} == {
        f"{job}_{rank}_log.{stream}" for rank in range(2) for stream in ("out", "err")
    }
    assert f"attempt 1 of job {job}" in (logs / f"{job}_1_log.err").read_text()


def test_the_weights_are_the_same(models: dict[str, dict[str, Any]]) -> None:
    digests = [model["files"]["model.safetensors"] for model in models.values()]
    assert digests[0] == digests[1]
