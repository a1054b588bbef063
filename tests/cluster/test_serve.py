"""A model served by a job on a real Slurm: its token lets clients in, and `cancel` ends it."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run import manifest
from hpc_rlhf.train import serve
from hpc_rlhf.train.models.export import export
from tests.cluster import Cluster, wait_until
from tests.launch.specs import make_spec
from tests.train import tiny

pytestmark = pytest.mark.slurm
ALL_NODES = ("--nodes=4", "--gpus-per-node=2")


def test_a_job_serves_through_requeues_until_the_run_is_cancelled(idle_cluster: Cluster, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", {"partition": "low", "time": "10"}, sft={})
    with claim(spec, "a test") as run:
        prepare(spec, run)
    folder = run.stage("sft").model
    export(tiny.causal("llama", vocab_size=300), tiny.tokenizer(), folder, is_main=True)
    manifest.write(folder, {"stage": "sft"})
    port = free_port()

    def cli(verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hpc_rlhf.cli", verb, str(run.path), *options]
        env = {**idle_cluster.env, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    served = cli("serve", "--slurm", "--port", str(port))
    assert served.returncode == 0, served.stderr
    (token,) = re.findall("OPENAI_API_KEY=(.*)", served.stdout)
    assert stat.S_IMODE((run.stage("sft").path / "serve.token").stat().st_mode) == 0o600
    (job,) = re.findall(r"job (\d+) serves sft", served.stderr)
    assert token not in idle_cluster.run("scontrol", "show", "job", job, "--details").stdout
    assert answers(port, token), "it serves when the command ends"
    # Slurm's signal before the time limit, and a preemption.
    idle_cluster.run("scancel", "--signal=USR2", job)
    wait_until(lambda: idle_cluster.field(job, "Restarts") == "1", 60, "the server to requeue its job")
    wait_until(lambda: answers(port, token), 120, "the requeued server")
    high = idle_cluster.sbatch("--partition=high", *ALL_NODES, "--output=/dev/null", "--wrap=true")
    wait_until(lambda: idle_cluster.field(job, "Restarts") == "2", 60, "the preemption")
    assert idle_cluster.wait_state(high, "COMPLETED") == "COMPLETED"
    wait_until(lambda: answers(port, token), 120, "the server after the preemption")
    second = cli("serve", "--slurm", "--port", str(port))
    assert (second.returncode, second.stdout) == (1, "")
    (log,) = re.findall(r"error: (.*): job \d+ ended before it served", second.stderr)
    assert "something else listens there" in Path(log).read_text()
    done = cli("cancel")
    assert re.search(rf"serve +{job} +RUNNING", done.stdout), done.stdout + done.stderr
    wait_until(lambda: idle_cluster.field(job, "JobState") == "CANCELLED", 120, "the job to end")
    serve.listen("127.0.0.1", port).close()
    assert "no job of this run" in cli("cancel").stderr


def answers(port: int, token: str) -> bool:
    """Whether the model is served."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0) as client:
        try:
            return [model.id for model in client.models.list()] == ["sft"]
        except openai.APIConnectionError:
            return False
