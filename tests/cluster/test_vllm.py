"""PPO and GRPO with vLLM over two nodes of a real Slurm, preempted in a rollout and between optimizer steps: updates
equal those of a run in peace that learns from the same responses, and no server is left."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.cluster import Cluster, config, wait_until
from tests.cluster.chain import Chain
from tests.cluster.cluster import CHECKOUT, SUCCEEDED
from tests.cluster.pauses import Pauses
from tests.cluster.processes import Process, find
from tests.cluster.replay import keep, replay
from tests.storm.verdict import differences

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm")]

STEPS = 6
NODES = "node[1-2]"
# While the responses of the third step are awaited, and before the third optimizer step on an experience.
PLACES = {"roll_out": 1, "learn": 3}
# An attempt starts two engines with two workers each.
SECONDS = 1200
SHARED: dict[str, Any] = {
    "max_steps": STEPS, "checkpoint_every": 1000, "micro_batch": 4, "global_batch": 16, "minibatches": 2,
    "precision": "fp32", "rewards": [{"format": ".*[aeiou]"}],
    "rollout": {"engine": "vllm", "tensor_parallel": 2, "args": {"num_gpu_blocks_override": 64}},
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "ppo": {**SHARED, "actor_lr": 1e-3, "critic_lr": 1e-3},
    "grpo": {**SHARED, "lr": 1e-3, "group_size": 4, "num_iterations": 2, "kl_coef": 0.1},
}


def chain_of(cluster: Cluster, folder: Path, stage: str, setup: list[str], **rollout: str) -> Chain:
    """A stage alone, with four ranks."""
    fields = {**STAGES[stage], "rollout": {**SHARED["rollout"], **rollout}}
    slurm = {"nodes": 2, "gpus_per_node": 2, "nodelist": NODES, "partition": "low", "time": "60", "setup": setup}
    sets = (
        *(f"stages.{other}=null" for other in ("sft", "reward", "ppo")), f"stages.{stage}={json.dumps(fields)}",
        *(f"slurm.{name}={json.dumps(value)}" for name, value in slurm.items()),
        "models.actor.from_scratch.hidden_size=64",
    )  # fmt: skip
    return Chain(cluster, CHECKOUT / "tests/cluster/jobs/chain.yaml", folder / "run", sets)


@pytest.mark.parametrize("stage", STAGES)
def test_preemptions_change_no_update_and_leave_no_server(idle_cluster: Cluster, tmp_path: Path, stage: str) -> None:
    pauses = Pauses(tmp_path / "site", PLACES, ranks=4)
    setup = ["export OMP_NUM_THREADS=1"]
    struck = chain_of(idle_cluster, tmp_path / "struck", stage, [*setup, f"export PYTHONPATH={pauses.folder}"])
    files, kept = struck.run.stage(stage), tmp_path / "kept"
    kept.mkdir()
    struck.submit()
    whole = ("--nodes=2", f"--nodelist={NODES}", f"--gpus-per-node={config.GPUS}")
    seen: set[Process] = set()
    for place in PLACES:
        struck.wait(stage, partial(pauses.all_wait, place), f"all ranks wait in {place}", seconds=SECONDS)
        keep(files, kept)
        running = of_servers(struck.job_id(stage))
        assert len(running) >= 2 * len(("keeper", "engine", "worker", "worker"))
        assert not seen & set(running)
        seen.update(running)
        idle_cluster.sbatch("--partition=high", *whole, "--output=/dev/null", "--wrap=true")
    struck.wait_done(stage, SECONDS)
    keep(files, kept)
    idle_cluster.wait_state(struck.job_id(stage), SUCCEEDED)
    wait_until(lambda: not any(each.alive for each in seen), 120, "the servers have ended")
    assert not of_servers(struck.job_id(stage))

    requeued, resumed = struck.events("requeued", stage), struck.events("resumed", stage)
    assert [event.reason for event in requeued] == ["preempted"] * len(PLACES)
    assert [event.step for event in resumed] == [event.step for event in requeued]
    assert struck.steps(stage) == list(range(1, STEPS + 1))
    asked = [weights(file).rpartition("/")[0] for file in sorted(kept.glob("*-rollout-0.safetensors"))]
    starts = [start.attempt for start in struck.events("started", stage)]
    assert asked == [starts[0]] * 2 + [starts[1]] * 3 + [starts[2]]  # one attempt was asked for each step

    peace = tmp_path / "peace"
    python = replay(Chain(idle_cluster, struck.spec, peace / "run").run.stage(stage), kept, tmp_path / "vllm")
    undisturbed = chain_of(idle_cluster, peace, stage, setup, python=python)
    undisturbed.submit()
    undisturbed.wait_done(stage)
    assert differences(struck, undisturbed, [stage]) == []


def of_servers(job: str) -> list[Process]:
    """The processes of a job's servers, on all nodes. The environment of vLLM's workers cannot be read."""
    engines = find(lambda each: f"SLURM_JOB_ID={job}" in each.environ() and "hpc_rlhf_vllm.py" in each.command())
    sessions = {engine.session for engine in engines} - {0}
    return find(lambda each: each.session in sessions)


def weights(file: Path) -> str:
    """The version of the weights that a rollout was made with."""
    with safe_open(str(file), "pt") as opened:
        return str(opened.metadata()["weights"])
