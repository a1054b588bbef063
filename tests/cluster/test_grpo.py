"""GRPO on a real Slurm, preempted in a rollout, in its rewards and between its optimizer steps: the same weights as in
peace."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_rlhf.run import manifest
from tests.cluster import Cluster
from tests.cluster.chain import Chain
from tests.cluster.cluster import CHECKOUT, SUCCEEDED
from tests.cluster.pauses import Pauses

STEPS = 8
# Among the tokens of the rollout, after the rewards, and before the third of four optimizer steps.
PLACES = {"roll_out": 3, "score": 1, "learn": 3}
GRPO = {
    **{"max_steps": STEPS, "lr": 1e-3, "micro_batch": 4, "global_batch": 16, "minibatches": 2, "num_iterations": 2},
    **{"group_size": 4, "kl_coef": 0.1, "precision": "fp32", "rewards": [{"format": ".*[aeiou]"}]},
}


def grpo(cluster: Cluster, folder: Path, node: str, **slurm: object) -> Chain:
    """GRPO alone, with two ranks."""
    settings = {"nodes": 1, "gpus_per_node": 2, "nodelist": node, **slurm}
    stages = ["stages.sft=null", "stages.reward=null", "stages.ppo=null", f"stages.grpo={json.dumps(GRPO)}"]
    sets = (*stages, *(f"slurm.{name}={json.dumps(value)}" for name, value in settings.items()))
    return Chain(cluster, CHECKOUT / "tests/cluster/jobs/chain.yaml", folder / "run", sets)


def test_preemptions_anywhere_in_a_step_change_no_weight(idle_cluster: Cluster, tmp_path: Path) -> None:
    pauses = Pauses(tmp_path / "site", PLACES, ranks=2)
    peace = grpo(idle_cluster, tmp_path / "peace", "node1", partition="gpu")
    setup = ["export OMP_NUM_THREADS=1", f"export PYTHONPATH={pauses.folder}"]
    struck = grpo(idle_cluster, tmp_path / "struck", "node2", partition="low", setup=setup)
    for chain in (peace, struck):
        chain.submit()
    pauses.preempt(idle_cluster, "node2")
    for chain in (peace, struck):
        chain.wait_done("grpo")
    idle_cluster.wait_state(struck.job_id("grpo"), SUCCEEDED)
    requeued, resumed = struck.events("requeued", "grpo"), struck.events("resumed", "grpo")
    assert [event.reason for event in requeued] == ["preempted"] * len(PLACES)
    assert [event.step for event in resumed] == [event.step for event in requeued]
    assert struck.steps("grpo") == peace.steps("grpo") == list(range(1, STEPS + 1))
    models = [manifest.require(chain.run.stage("grpo").model, "the model")["files"] for chain in (peace, struck)]
    assert models[0]["model.safetensors"] == models[1]["model.safetensors"]
