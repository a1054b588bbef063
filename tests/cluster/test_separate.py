"""vLLM on a node of its own, by a stand-in: GRPO that is preempted while the next rollout is generated has the same
weights in the end, and nobody learns the key."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_rlhf.run import manifest
from tests.cluster import Cluster
from tests.cluster.chain import Chain
from tests.cluster.cluster import CHECKOUT, SUCCEEDED
from tests.cluster.pauses import Pauses
from tests.cluster.test_grpo import GRPO, STEPS
from tests.spec.test_rollout import python_with
from tests.train.rollout.stand_in_vllm import interpreter

PLACES = {"score": 1, "learn": 3}


def grpo(cluster: Cluster, folder: Path, nodes: str, partition: str, setup: list[str]) -> Chain:
    """Two ranks on a node, and two servers on another."""
    folder.mkdir()
    python = Path(python_with(folder, "0.32.0"))
    interpreter(python.parent, "draws")
    rollout = {"engine": "vllm", "python": str(python), "placement": {"separate": {"nodes": 1}}, "overlap": 1}
    slurm = {"nodes": 1, "gpus_per_node": 2, "nodelist": nodes, "partition": partition, "setup": setup}
    stages = ("stages.sft=null", "stages.reward=null", "stages.ppo=null")
    sets = (*stages, f"stages.grpo={json.dumps({**GRPO, 'rollout': rollout})}", f"slurm={json.dumps(slurm)}")
    return Chain(cluster, CHECKOUT / "tests/cluster/jobs/chain.yaml", folder / "run", sets)


def test_preemptions_change_no_weight_and_show_no_key(idle_cluster: Cluster, tmp_path: Path) -> None:
    pauses = Pauses(tmp_path / "site", PLACES, ranks=2)
    threads = "export OMP_NUM_THREADS=1"
    peace = grpo(idle_cluster, tmp_path / "peace", "node[1-2]", "gpu", [threads])
    struck = grpo(
        idle_cluster, tmp_path / "struck", "node[3-4]", "low", [threads, f"export PYTHONPATH={pauses.folder}"]
    )
    for chain in (peace, struck):
        chain.submit()
    pauses.preempt(idle_cluster, "node4")
    for chain in (peace, struck):
        chain.wait_done("grpo")
        idle_cluster.wait_state(chain.job_id("grpo"), SUCCEEDED)
    assert [event.reason for event in struck.events("requeued", "grpo")] == ["preempted"] * len(PLACES)
    assert struck.steps("grpo") == peace.steps("grpo") == list(range(1, STEPS + 1))
    models = [manifest.require(chain.run.stage("grpo").model, "the model")["files"] for chain in (peace, struck)]
    assert models[0]["model.safetensors"] == models[1]["model.safetensors"]
    for number in range(2):
        address = struck.run.stage("grpo").engine / f"agent-{number}.json"
        key = json.loads(address.read_text())["key"]
        assert address.stat().st_mode & 0o777 == 0o600
        others = [file for file in struck.path.rglob("*") if file.is_file() and file != address]
        assert not [file for file in others if key.encode() in file.read_bytes()]
