"""The faults of a storm, each with the reasons that the ledger may then give for the attempt's end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.run import reasons as causes
from hpc_rlhf.run.layout import StageDir
from tests.cluster import Cluster, config
from tests.cluster.chain import Chain
from tests.cluster.processes import Process, find
from tests.storm.here import Here

# System calls of a save to die at, and after how many; the manifest is the last file written and renamed.
AIMS = (("mkdir", 2), ("open", 8), ("write", 20), ("fsync", 12), ("rename", 2), ("unlink", 6))
DISK_FULL, AWAY = (1.0, 6.0), (1.0, 8.0)  # seconds
SKEWS = (-86400, -3600, 300, 3600, 86400)  # seconds
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Victim:
    """A running attempt at a stage.

    Attributes:
        job: its Slurm job; empty without Slurm.
        storm: the folder with the orders for this stage's shim.
    """

    chain: Chain | Here
    stage: str
    job: str
    random: random.Random
    storm: Path

    @property
    def cluster(self) -> Cluster:
        assert isinstance(self.chain, Chain)
        return self.chain.cluster

    @property
    def launcher(self) -> int:
        """The process of `hpc-rlhf run`."""
        assert isinstance(self.chain, Here)
        return self.chain.launcher.pid

    @property
    def files(self) -> StageDir:
        return self.chain.run.stage(self.stage)

    @property
    def nodes(self) -> list[str]:
        names = self.cluster.field(self.job, "NodeList")
        return self.cluster.run("scontrol", "show", "hostnames", names).stdout.split()

    @property
    def partition(self) -> str:
        return self.cluster.field(self.job, "Partition")

    def ranks(self) -> list[Process]:
        """Its rank processes."""
        mine = f"STORM={self.storm}"

        def is_rank(process: Process) -> bool:
            pairs, command = process.environ(), process.command()
            numbered = any(pair.startswith(("SLURM_PROCID=", "SUBMITIT_LOCAL_GLOBALID=")) for pair in pairs)
            return mine in pairs and numbered and "-m hpc_rlhf.rank" in command and not command.startswith("srun")

        return find(is_rank)


Strike = Callable[[Victim], frozenset[str] | None]
"""Injects a fault. Returns the reasons the attempt may now end with (none if it continues), or None if not possible."""


def kill_a_rank(victim: Victim) -> frozenset[str] | None:
    ranks = victim.ranks()
    if not ranks:
        return None
    victim.random.choice(sorted(ranks, key=lambda process: process.pid)).kill()
    return frozenset({causes.KILLED})


def aim(victim: Victim) -> frozenset[str]:
    call, most = victim.random.choice(AIMS)
    return _aim(victim, call, victim.random.randint(0, most), causes.KILLED)


def fail_a_flush(victim: Victim) -> frozenset[str]:
    return _aim(victim, "eio", victim.random.randint(0, 4), causes.FAILED)


def _aim(victim: Victim, call: str, skip: int, reason: str) -> frozenset[str]:
    # Not in the model's folder: its last rename finishes the stage, and nothing after that is an interruption.
    draft = victim.storm / "aim.draft"
    draft.write_text(f"{call} {skip} /{victim.stage}/checkpoints/\n")
    draft.rename(victim.storm / "aim")
    return frozenset({reason})


def preempt(victim: Victim) -> frozenset[str]:
    """Preempt with enough grace to save."""
    _take_nodes(victim)
    return frozenset({causes.PREEMPTED})


def preempt_and_kill_in_the_save(victim: Victim) -> frozenset[str]:
    aim(victim)
    _take_nodes(victim)
    return frozenset({causes.PREEMPTED, causes.KILLED})


def preempt_at_once(victim: Victim) -> frozenset[str]:
    """Preempt without grace."""
    partition = victim.partition
    victim.cluster.run("scontrol", "update", f"PartitionName={partition}", "GraceTime=0")
    try:
        _take_nodes(victim)
    finally:
        victim.cluster.run("scontrol", "update", f"PartitionName={partition}", f"GraceTime={config.GRACE_SECONDS}")  # fmt: skip  # noqa: E501
    return frozenset({causes.PREEMPTED})


def _take_nodes(victim: Victim) -> None:
    nodes = victim.nodes
    options = ("--partition=high", f"--nodelist={','.join(nodes)}", f"--nodes={len(nodes)}", f"--gpus-per-node={config.GPUS}")  # fmt: skip  # noqa: E501
    job = victim.cluster.sbatch(*options, "--output=/dev/null", "--job-name=intruder", "--wrap=sleep 1")
    victim.cluster.wait_state(job, ("RUNNING", "COMPLETED"), timeout=120)


def run_out_of_time(victim: Victim) -> frozenset[str]:
    """Reach the time limit, announced by a signal; the next attempt gets the full time again."""
    minutes = int(_seconds(victim.cluster.field(victim.job, "RunTime")) // 60) + 1
    victim.cluster.run("scontrol", "update", f"job={victim.job}", f"TimeLimit={minutes}")
    return frozenset({causes.TIME_LIMIT})


def cut_off_at_the_limit(victim: Victim) -> frozenset[str]:
    """Reach the time limit unannounced."""
    victim.cluster.run("scontrol", "update", f"job={victim.job}", "EndTime=now+1")
    return frozenset({causes.TIME_LIMIT})


def lose_a_node(victim: Victim) -> frozenset[str]:
    """Kill a node's slurmd while its ranks keep running; it returns after the attempt has ended."""
    victim.cluster.kill_node(victim.random.choice(victim.nodes))
    return frozenset({causes.NODE_FAILURE})


def requeue_from_outside(victim: Victim) -> frozenset[str]:
    victim.cluster.run("scontrol", "requeue", victim.job)
    return frozenset({causes.REQUEUED_BY_HAND})


def restart_the_controller(victim: Victim) -> frozenset[str]:
    victim.cluster.stop_controller()
    time.sleep(victim.random.uniform(*AWAY))
    victim.cluster.start_controller()
    return NOTHING


def kill_while_the_controller_is_away(victim: Victim) -> frozenset[str] | None:
    victim.cluster.stop_controller()
    try:
        reasons = kill_a_rank(victim)
        time.sleep(victim.random.uniform(*AWAY))
    finally:
        victim.cluster.start_controller()
    return reasons


def cancel_the_sentinel(victim: Victim) -> frozenset[str] | None:
    lines = victim.cluster.run("squeue", "-h", "-t", "PD", "--format=%i %j").stdout.splitlines()
    sentinels = [line.split()[0] for line in lines if line.endswith(f".{victim.stage}.sentinel")]
    if not sentinels:
        return None
    victim.cluster.run("scancel", *sentinels)
    return NOTHING


def call_twice(victim: Victim) -> frozenset[str]:
    """Heal twice at the same moment and submit again."""
    assert isinstance(victim.chain, Chain)
    command = [sys.executable, "-m", "hpc_rlhf.cli"]
    calls = [["heal", str(victim.chain.path)], ["heal", str(victim.chain.path)], ["submit", *victim.chain.submission]]
    started = [
        subprocess.Popen([*command, *call], env=victim.cluster.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: E501
        for call in calls
    ]  # fmt: skip
    for process in started:
        process.wait(120)
    return NOTHING


def spoil_a_checkpoint(victim: Victim) -> frozenset[str] | None:
    """Truncate a file of the last checkpoint or flip a bit in it, then kill a rank."""
    steps = sorted(victim.files.checkpoints.glob("step-*"), reverse=True)
    if len(steps) < 2:
        return None
    files = sorted(path for path in steps[0].rglob("*") if path.is_file())
    reasons = kill_a_rank(victim)
    if reasons is None or not files:
        return reasons
    path = victim.random.choice(files)
    try:
        content = bytearray(path.read_bytes())
        place = victim.random.randrange(len(content))
        if victim.random.random() < 0.5:
            del content[place:]
        else:
            content[place] ^= 1 << victim.random.randrange(8)
        path.write_bytes(content)
    except OSError:
        pass  # pruned in the meantime
    return reasons


def fill_the_disk(victim: Victim) -> frozenset[str]:
    """Fill the run's own small file system for a while."""
    ballast = victim.chain.path.parent / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)) == 1 << 20:
                pass
    except OSError:
        pass
    try:
        time.sleep(victim.random.uniform(*DISK_FULL))
    finally:
        ballast.unlink()
    return frozenset({causes.FAILED, ""})


def put_the_clock_wrong(victim: Victim) -> frozenset[str] | None:
    """Set a wrong clock for the next attempt."""
    (victim.storm / "clock").write_text(str(victim.random.choice(SKEWS)))
    return kill_a_rank(victim)


def interrupt(victim: Victim) -> frozenset[str]:
    """Interrupt the launcher as Ctrl-C does."""
    os.kill(victim.launcher, signal.SIGINT)
    return frozenset({"interrupted"})


def kill_the_launcher(victim: Victim) -> frozenset[str]:
    os.kill(victim.launcher, signal.SIGKILL)
    return frozenset({"interrupted"})


@dataclass(frozen=True)
class Fault:
    """A kind of fault and its weight in a storm.

    Attributes:
        blamed: whether the retry policy counts it against the stage: two without progress stop the chain.
        wide: whether it hits all running stages.
    """

    strike: Strike
    weight: float
    blamed: bool = False
    wide: bool = False

    @property
    def name(self) -> str:
        return self.strike.__name__.replace("_", " ")


FAULTS = (
    Fault(kill_a_rank, 3, blamed=True),
    Fault(aim, 4, blamed=True),
    Fault(fail_a_flush, 1, blamed=True),
    Fault(preempt, 3),
    Fault(preempt_and_kill_in_the_save, 1.5, blamed=True),
    Fault(preempt_at_once, 2),
    Fault(run_out_of_time, 1),
    Fault(cut_off_at_the_limit, 1.5, blamed=True),
    Fault(lose_a_node, 0.7),
    Fault(requeue_from_outside, 1.5),
    Fault(restart_the_controller, 1),
    Fault(kill_while_the_controller_is_away, 1, blamed=True),
    Fault(cancel_the_sentinel, 1),
    Fault(call_twice, 1),
    Fault(spoil_a_checkpoint, 1.5, blamed=True),
    Fault(fill_the_disk, 1, blamed=True, wide=True),
    Fault(put_the_clock_wrong, 1, blamed=True),
)

# Without Slurm.
LOCAL_FAULTS = (
    *(
        fault
        for fault in FAULTS
        if fault.strike in (kill_a_rank, aim, fail_a_flush, spoil_a_checkpoint, put_the_clock_wrong)
    ),
    Fault(fill_the_disk, 1, blamed=True),
    Fault(interrupt, 2),
    Fault(kill_the_launcher, 2),
)


def _seconds(span: str) -> float:
    days, _, clock = span.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
