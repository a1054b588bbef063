"""The test cluster works as the tests of the chain need it: GPUs, accounting, requeue, preemption, and
removal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster import Cluster, ClusterError, config, wait_until
from tests.cluster.cluster import CHECKOUT, MARK
from tests.cluster.processes import Process, find

pytestmark = pytest.mark.slow

# A job that prints which attempt it is, and ends in its second one.
COUNTING = """#!/bin/bash
#SBATCH --requeue --open-mode=append --ntasks-per-node=1 --gpus-per-node=2 --nodes={nodes}
echo "run ${{SLURM_RESTART_COUNT:-0}}"
[[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 ]] || srun sleep 300
"""


def counting(folder: Path, nodes: int = 1) -> Path:
    script = folder / "counting.sh"
    script.write_text(COUNTING.format(nodes=nodes))
    return script


def test_nodes_are_idle_and_have_their_gpus(idle_cluster: Cluster) -> None:
    lines = idle_cluster.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T %G %c").stdout.splitlines()
    assert lines == [f"node{index} idle gpu:2 8" for index in range(1, 5)]


def test_ranks_on_two_nodes_have_different_ids(idle_cluster: Cluster) -> None:
    show = "echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"
    done = idle_cluster.run(
        *("srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--gpus-per-task=1", "--label"),
        *("bash", "-c", show),
    )
    ranks = sorted(line.split(": ")[1].split() for line in done.stdout.splitlines())
    assert [rank[0] for rank in ranks] == ["0", "1", "2", "3"]
    places = {(node, local) for _, node, local, _ in ranks}
    assert len(places) == 4
    assert len({node for node, _ in places}) == 2
    assert len({(node, device) for _, node, _, device in ranks}) == 4


def test_accounting_has_a_job_and_its_comment(idle_cluster: Cluster, tmp_path: Path) -> None:
    job = idle_cluster.sbatch("--wrap=exit 3", "--comment=token-1", f"--output={tmp_path}/%j.out")
    command = ("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode,Comment")
    wait_until(lambda: idle_cluster.run(*command).stdout.strip() == "FAILED|3:0|token-1", 120, "sacct shows its end")


def test_requeue_keeps_the_id_and_is_quick(idle_cluster: Cluster, tmp_path: Path) -> None:
    job = idle_cluster.sbatch(f"--output={tmp_path}/%j.out", counting(tmp_path))
    idle_cluster.wait_state(job, "RUNNING")
    idle_cluster.run("scontrol", "requeue", job)
    idle_cluster.wait_state(job, "COMPLETED", timeout=40)
    assert (tmp_path / f"{job}.out").read_text().splitlines()[-1] == "run 1"
    assert idle_cluster.field(job, "Restarts") == "1"


@pytest.mark.parametrize(("partition", "end"), [("low", "COMPLETED"), ("low-cancel", "PREEMPTED")])
def test_a_high_job_preempts(idle_cluster: Cluster, tmp_path: Path, partition: str, end: str) -> None:
    """By requeueing or cancelling, as the partition is configured, if the job does not end within its grace
    time."""
    script = tmp_path / "stubborn.sh"
    script.write_text(
        "#!/bin/bash\n"
        "#SBATCH --requeue --nodes=4 --ntasks-per-node=1 --gpus-per-node=2\n"
        """((${SLURM_RESTART_COUNT:-0})) || srun bash -c "trap '' TERM; while :; do sleep 1; done"\n"""
    )
    with graces_of(idle_cluster, seconds=2):
        low = idle_cluster.sbatch(f"--partition={partition}", f"--output={tmp_path}/low.out", script)
        idle_cluster.wait_state(low, "RUNNING")
        high = idle_cluster.sbatch(
            *("--partition=high", "--gpus-per-node=2", f"--output={tmp_path}/high.out", "--wrap=true")
        )
        idle_cluster.wait_state(high, "COMPLETED", timeout=60)
        assert idle_cluster.wait_state(low, ("COMPLETED", "PREEMPTED"), timeout=60) == end


def test_a_second_cluster_runs_in_parallel_and_leaves_nothing(cluster: Cluster, short_tmp: Path) -> None:
    other = Cluster(short_tmp / "second")
    other.start()
    assert other.conf != cluster.conf
    cluster.run("sinfo")
    job = other.sbatch("--output=/dev/null", "--wrap=srun sleep 300")
    other.wait_state(job, "RUNNING")
    wait_until(lambda: jobs_of(other), 120, "the job's processes are there")
    daemons = other.daemons()
    assert len(daemons) == 8
    other.stop()
    assert not other.folder.exists()
    assert not [name for name, process in daemons.items() if process.alive]
    assert not find(lambda process: f"{MARK}={other.folder}" in process.environ())
    assert not jobs_of(other)
    assert str(other.folder) not in Path("/proc/mounts").read_text()
    cluster.run("sinfo")


def test_a_failed_start_has_a_reason_and_leaves_nothing(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "slurmdbd_conf", lambda folder, ports: "Nonsense=1\n")
    broken = Cluster(short_tmp / "broken")
    with pytest.raises(ClusterError, match=r"(?s)slurmdbd exited.*Nonsense"):
        broken.start()
    assert not broken.folder.exists()
    assert not find(lambda process: f"{MARK}={broken.folder}" in process.environ())


def test_the_cluster_ends_with_its_owner(short_tmp: Path) -> None:
    """Also if the owner is killed with SIGKILL."""
    folder = short_tmp / "orphan"
    code = (
        "import os, pathlib, signal\nfrom tests.cluster import Cluster\n"
        f"Cluster(pathlib.Path({str(folder)!r}), owner=os.getpid()).start()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    owner = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, env=os.environ)
    assert owner.returncode == -signal.SIGKILL
    wait_until(lambda: not folder.exists(), 120, "the watchdog removed the cluster")
    assert not find(lambda process: f"{MARK}={folder}" in process.environ())


@contextmanager
def graces_of(cluster: Cluster, seconds: int) -> Iterator[None]:
    """Shorten the grace time of the preemptible partitions, for jobs that use all of it."""

    def set_to(grace: int) -> None:
        for partition in ("low", "low-cancel"):
            cluster.run("scontrol", "update", f"PartitionName={partition}", f"GraceTime={grace}")

    set_to(seconds)
    try:
        yield
    finally:
        set_to(config.GRACE_SECONDS)


def jobs_of(cluster: Cluster) -> list[Process]:
    return find(lambda process: f"SLURM_CONF={cluster.conf}" in process.environ() and "sleep" in process.command())
