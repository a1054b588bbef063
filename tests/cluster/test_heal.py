"""Chains that break on a real Slurm, and repair themselves or stop with a reason. Their stages only simulate
training.

All chains are submitted at once, each with prepared faults and a thread that attacks it, and are then checked
one by one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.cluster import Cluster, ClusterError, config, wait_until
from tests.cluster.chain import Chain
from tests.cluster.cluster import CHECKOUT
from tests.cluster.processes import Process, find, kill_and_wait

pytestmark = pytest.mark.generations

SPEC = CHECKOUT / "tests/cluster/jobs/stand-in.yaml"
STAND_IN = CHECKOUT / "tests/launch/stand_in"
# Seconds that anything may take on a very busy machine; an idle one needs a few.
PATIENCE = 240
ALONE = ("stages.reward=null", "stages.ppo=null")
FOLLOWED = (*ALONE, "stages.dpo={}")
HERE = ("slurm.partition=first",)
# One chain has the last two nodes for itself, because it loses them.
LOSABLE = ("slurm.partition=last", "slurm.heal.partition=first")


def preemptable(partition: str, node: int) -> tuple[str, ...]:
    """On one node, so that one intruder preempts both chains there."""
    others = ",".join(f"node{each}" for each in range(1, config.NODES + 1) if each != node)
    where = (f"slurm.partition={partition}", f"slurm.exclude={others}", "slurm.heal.partition=first")
    return (*where, "slurm.gpus_per_node=1")


# The faults of each chain, as the stand-in reads them, and its settings.
CHAINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raises": ("sft 6 raise device-side assert", HERE),
    "mistaken": ("sft 2 mistake data.json: no such file", (*ALONE, *HERE)),
    "cancelled": ("sft 6 deaf", (*ALONE, *HERE)),
    "node-lost": ("sft 6 deaf", (*FOLLOWED, *LOSABLE)),
    "limit-told": ("sft 6 wait", (*FOLLOWED, *HERE)),
    "limit-cut": ("sft 6 deaf", (*FOLLOWED, *HERE)),
    "requeue-grace": ("sft 6 wait", (*FOLLOWED, *preemptable("low", 1))),
    "cancel-grace": ("sft 6 wait", (*FOLLOWED, *preemptable("low-cancel", 1))),
    "requeue-now": ("sft 6 deaf", (*FOLLOWED, *preemptable("low-now", 2))),
    "cancel-now": ("sft 6 deaf", (*FOLLOWED, *preemptable("low-cancel-now", 2))),
    "by-hand": ("sft 6 deaf", (*FOLLOWED, *HERE)),
    "exception": ("sft 6 raise-once one\nsft 10 raise-once two", (*FOLLOWED, *HERE)),
    "killed": ("sft 6 die\nsft 10 die", (*FOLLOWED, *HERE)),
    "memory": ("sft 6 memory\nsft 10 memory", (*FOLLOWED, *HERE)),
    "controller": ("sft 6 deaf", (*FOLLOWED, *HERE)),
}
AT = (5, 9)  # the last steps before the faults
SAVED = (4, 8)


@dataclass(frozen=True)
class StandIn(Chain):
    """A chain of stand-ins."""

    given_up: threading.Event = field(default_factory=threading.Event)

    @property
    def fault(self) -> Path:
        return self.path.with_suffix(".fault")

    @property
    def env(self) -> dict[str, str]:
        return {**self.cluster.env, "PYTHONPATH": str(STAND_IN), "STAND_IN_FAULT": str(self.fault)}

    def store(self, fault: str) -> None:
        """Replace the prepared fault atomically, because a stage reads it repeatedly."""
        draft = self.fault.with_suffix(".draft")
        draft.write_text(fault)
        draft.rename(self.fault)

    def await_fault(self, step: int = AT[0]) -> str:
        """Wait until SFT has reached its fault, and return its job."""
        self.await_that(lambda: self.steps("sft")[-1:] == [step], f"SFT is at step {step}")
        return self.job_id("sft")

    def await_end(self, stage: str = "sft") -> None:
        self.await_that(lambda: self.is_done(stage), f"{stage} is done")

    def await_endings(self, times: int) -> None:
        self.await_that(lambda: len(self.endings()) >= times, f"{times} attempts have ended")

    def await_stop(self) -> str:
        """The reason that status shows once the chain has stopped."""
        self.await_that(lambda: self.events("stopped", "sft"), "the chain has stopped")
        return str(self.status()["sft"]["why"])

    def await_that(self, holds: Callable[[], object], what: str) -> None:
        try:
            wait_until(lambda: self.given_up.is_set() or holds(), PATIENCE, what)
        except ClusterError as error:
            queue = self.cluster.run("squeue", "--states=all", "--format=%i %j %T %r %E", check=False).stdout
            logs = "".join(log.read_text() for log in self.path.glob("stages/*/logs/*.out"))
            raise ClusterError(f"{error}\n{queue}\n{self.run.ledger.read_text()}\n{logs}") from None
        if self.given_up.is_set():
            raise ClusterError("given up")

    def endings(self) -> list[tuple[str, int]]:
        """How SFT's unfinished attempts ended, and after which steps."""
        events = sorted(self.events("ended", "sft") + self.events("requeued", "sft"), key=lambda e: e.time)
        return [(event.reason, event.step) for event in events]

    def sentinels(self) -> list[str]:
        """The ids of SFT's pending sentinels."""
        token = self.events("submitting", "sft")[-1].token
        lines = self.cluster.run("squeue", "-h", "-t", "PD", "--format=%i %k").stdout.splitlines()
        return [line.split()[0] for line in lines if line.endswith(f"hpc-rlhf-sentinel:{token}")]

    def left_running(self) -> list[Process]:
        """Processes of this run that do not belong to a job."""

        def loose(process: Process) -> bool:
            if str(self.path) not in process.command():
                return False
            return not any(pair.startswith("SLURM_JOB_ID=") for pair in process.environ())

        return find(loose)


# Attacks on chains


def strike_twice(
    blow: Callable[..., object], repair: Callable[[StandIn], object] | None, chains: Sequence[StandIn]
) -> None:
    """Wait until all chains are at their fault and strike; strike again some steps later; then wait for their
    end.

    Args:
        repair: what must be done after a blow before a chain can continue.
    """
    for count, (step, after) in enumerate(zip(AT, ("sft 10", ""), strict=True), 1):
        for chain in chains:
            chain.await_fault(step)
        blow(*chains)
        for chain in chains:
            chain.await_endings(count)
            if repair is not None:
                repair(chain)
            kind = chain.fault.read_text().split(" ")[2]
            chain.store(f"{after} {kind}" if after else "")
    see_through(chains)


def see_through(chains: Sequence[StandIn]) -> None:
    for chain in chains:
        chain.await_end("sft")
        chain.await_end("dpo")


def intrude(*chains: StandIn) -> None:
    """Preempt them on the node that they share."""
    cluster = chains[0].cluster
    (node,) = {cluster.field(chain.job_id("sft"), "NodeList") for chain in chains}
    options = ("--partition=high", f"--nodelist={node}", f"--gpus-per-node={config.GPUS}")
    cluster.sbatch(*options, "--output=/dev/null", "--wrap=true")


def requeue_by_hand(chain: StandIn) -> None:
    chain.cluster.run("scontrol", "requeue", chain.job_id("sft"))


def lose_node(chain: StandIn) -> None:
    chain.cluster.kill_node(chain.cluster.field(chain.job_id("sft"), "NodeList"))


def dead_nodes(cluster: Cluster) -> list[str]:
    return [name for name, daemon in cluster.daemons().items() if name.startswith("node") and not daemon.alive]


def bring_node_back(chain: StandIn) -> None:
    (lost,), job = dead_nodes(chain.cluster), chain.job_id("sft")
    assert chain.cluster.field(job, "NodeList") != lost
    chain.await_that(chain.sentinels, "the new attempt has a sentinel")
    # Once its task has ended, its srun would end the step of the same number, which is the new attempt's.
    kill_and_wait(find(lambda process: is_batch_script(process, job, lost)))
    chain.cluster.start_node(lost)  # ends what still runs there


def is_batch_script(process: Process, job: str, node: str) -> bool:
    """Whether a process is the script of a job on a node, or was started by it outside of steps."""
    environ = process.environ()
    in_step = any(pair.startswith("SLURM_STEP_ID=") for pair in environ)
    return environ >= {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}"} and not in_step


def run_out_of_time(chain: StandIn) -> None:
    """Shorten the time limit, so that Slurm soon signals its end."""
    job = chain.job_id("sft")
    minutes = chain.cluster.field(job, "RunTime").split(":")[1]
    chain.cluster.run("scontrol", "update", f"job={job}", f"TimeLimit={int(minutes) + 2}")


def cut_off(chain: StandIn) -> None:
    chain.cluster.run("scontrol", "update", f"job={chain.job_id('sft')}", "EndTime=now+1")


def give_time(chain: StandIn) -> None:
    """As soon as Slurm allows it, which it does not while the job is being requeued."""
    change = ("scontrol", "update", f"job={chain.job_id('sft')}", "TimeLimit=10")
    chain.await_that(lambda: chain.cluster.run(*change, check=False).returncode == 0, "the next attempt has time")


@contextmanager
def controller_away(cluster: Cluster) -> Iterator[None]:
    cluster.stop_controller()
    try:
        yield
    finally:
        cluster.start_controller()


STRIKES: dict[tuple[str, ...], Callable[[Sequence[StandIn]], None]] = {
    ("node-lost",): partial(strike_twice, lose_node, bring_node_back),
    ("limit-told",): partial(strike_twice, run_out_of_time, give_time),
    ("limit-cut",): partial(strike_twice, cut_off, give_time),
    ("requeue-grace", "cancel-grace"): partial(strike_twice, intrude, None),
    ("requeue-now", "cancel-now"): partial(strike_twice, intrude, None),
    ("by-hand",): partial(strike_twice, requeue_by_hand, None),
    ("exception",): see_through,
    ("killed",): see_through,
    ("memory",): see_through,
}


@dataclass(frozen=True)
class Scene:
    """All chains, and the attacks on them."""

    chains: dict[str, StandIn]
    strikes: dict[str, Future[None]]
    left_by_submit: list[str]

    def __getitem__(self, name: str) -> StandIn:
        return self.chains[name]

    def seen_through(self, name: str) -> StandIn:
        """A chain after all attacks."""
        self.strikes[name].result()
        return self.chains[name]


@pytest.fixture(scope="module")
def scene(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder, given_up = tmp_path_factory.mktemp("heal"), threading.Event()
    scene = Scene({}, {}, [])
    with ThreadPoolExecutor(len(STRIKES)) as pool:
        try:
            for name, (fault, sets) in CHAINS.items():
                expedited = name == "node-lost" and cluster.version >= (25, 11)
                sets = (f"name={name}", *sets, *(["slurm.expedite=true"] if expedited else []))
                scene.chains[name] = chain = StandIn(cluster, SPEC, folder / name, sets, given_up)
                chain.store(fault)
                chain.submit(env=chain.env)
                scene.left_by_submit.extend(process.command() for process in chain.left_running())
                for names, strike in STRIKES.items():
                    if name == names[-1]:
                        struck = pool.submit(strike, [scene.chains[each] for each in names])
                        scene.strikes.update(dict.fromkeys(names, struck))
            yield scene
        finally:
            given_up.set()
    for name in dead_nodes(cluster):
        cluster.start_node(name)
    cluster.clear()


# Results


def test_a_user_error_is_not_retried(scene: Scene) -> None:
    chain = scene["mistaken"]
    why = chain.await_stop()
    assert why == "user error: data.json: no such file; fix the cause, then run hpc-rlhf heal"
    assert len(chain.events("started", "sft")) == 1


def test_a_cancelled_stage_stays_cancelled_until_the_user_heals(scene: Scene) -> None:
    chain = scene["cancelled"]
    job = chain.await_fault()
    chain.cluster.run("scancel", job)
    assert chain.await_stop() == "cancelled by hand; fix the cause, then run hpc-rlhf heal"
    assert not chain.events("retried", "sft")
    chain.fault.unlink()
    chain.cli("heal", chain.path, env=chain.env)
    chain.await_end()
    assert chain.events("resumed", "sft")[-1].step == SAVED[0]


def test_a_stage_that_fails_twice_alike_stops_and_continues_after_a_fix(scene: Scene) -> None:
    chain = scene["raises"]
    why = chain.await_stop()
    assert why.startswith("failed twice at step 5: RuntimeError: device-side assert;")
    assert len(chain.events("started", "sft")) == 2
    chain.await_end("reward")
    chain.await_that(lambda: chain.status()["ppo"]["state"] == "stuck", "status says that PPO cannot start")
    chain.fault.unlink()
    outcomes = json.loads(chain.cli("heal", chain.path, "--json", env=chain.env).stdout)
    assert [each["did"] for each in outcomes] == ["requeued", "done", "live"]
    for stage in ("sft", "ppo"):
        chain.await_end(stage)
    assert chain.events("resumed", "sft")[-1].step == SAVED[0]
    chain.await_that(lambda: not chain.sentinels(), "no sentinel is left")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exception", "failed"),
        ("killed", "killed"),
        ("memory", "out of memory"),
        ("by-hand", "requeued by hand"),
        ("requeue-now", "preempted"),
        ("cancel-now", "preempted"),
        ("limit-cut", "time limit"),
        ("node-lost", "node failure"),
    ],
)
def test_a_stage_that_was_killed_twice_resumes_and_its_dependent_follows(scene: Scene, name: str, reason: str) -> None:
    chain = scene.seen_through(name)
    assert chain.endings() == [(reason, step) for step in AT]
    assert chain.steps("sft") == [*range(1, 6), *range(5, 10), *range(9, 13)]
    for stage in ("sft", "dpo"):
        assert len(chain.events("submitted", stage)) == 1, "it continues under its own job id"
    assert chain.steps("dpo") == list(range(1, 13))


@pytest.mark.parametrize(
    ("name", "reason"), [("requeue-grace", "preempted"), ("cancel-grace", "preempted"), ("limit-told", "time limit")]
)
def test_a_stage_that_was_stopped_twice_loses_no_step_and_its_dependent_follows(
    scene: Scene, name: str, reason: str
) -> None:
    chain = scene.seen_through(name)
    assert chain.endings() == [(reason, step) for step in AT]
    assert chain.steps("sft") == chain.steps("dpo") == list(range(1, 13))
    for stage in ("sft", "dpo"):
        assert len(chain.events("submitted", stage)) == 1


def test_lost_nodes_are_recorded(scene: Scene) -> None:
    """Also if srun was lost with the node and nothing reported that."""
    endings = scene.seen_through("node-lost").events("ended", "sft")
    assert sorted(event.node for event in endings) == ["node3", "node4"]


def test_the_cause_of_killed_ranks_is_recorded(scene: Scene) -> None:
    for event in scene.seen_through("killed").events("ended", "sft"):
        assert "Killed" in event.message
    for event in scene.seen_through("memory").events("ended", "sft"):
        assert event.message == "MemoryError:"


def test_a_controller_that_is_away_twice_only_costs_time(scene: Scene) -> None:
    """The first time the stage keeps training; the second time a rank is killed meanwhile. In between, an
    attempt replaces its cancelled sentinel."""
    chain = scene["controller"]
    chain.await_fault()
    wait(scene.strikes.values())  # they could not be done without a controller
    with controller_away(chain.cluster):
        chain.store("sft 10 deaf")
        chain.await_fault(AT[1])
    chain.cluster.run("scancel", *chain.sentinels())
    chain.await_that(lambda: not chain.sentinels(), "the sentinel is gone")
    requeue_by_hand(chain)
    chain.await_endings(1)
    chain.await_that(chain.sentinels, "the sentinel is back")
    with controller_away(chain.cluster):
        chain.store("sft 10 die")
        chain.await_that(lambda: not chain.fault.read_text(), "the rank is killed")
    see_through([chain])
    assert chain.endings() == [("requeued by hand", AT[1]), ("killed", AT[1])]
    assert chain.steps("sft") == [*range(1, 10), 9, *range(9, 13)]


def test_nothing_stays_on_the_login_node(scene: Scene) -> None:
    assert not scene.left_by_submit
    wait(scene.strikes.values())
    assert not [process.command() for chain in scene.chains.values() for process in chain.left_running()]
