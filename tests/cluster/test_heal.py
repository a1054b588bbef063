"""Chains that break on a real Slurm, and mend themselves, or stop and say why. Their stages only seem to train.

All of them are sent off at once, each with a fault in store, and then looked at one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import Cluster, ClusterError, wait_until
from tests.cluster.chain import Chain
from tests.cluster.cluster import CHECKOUT

SPEC = CHECKOUT / "tests/cluster/jobs/stand-in.yaml"
STAND_IN = CHECKOUT / "tests/launch/stand_in"
# Other tests wait as long for a busy machine as this; a quiet one needs a few seconds.
PATIENCE = 240
ALONE = ("stages.reward=null", "stages.ppo=null")
# One chain has the last two nodes to itself, because it loses them.
HERE = ("slurm.partition=first",)
PREEMPTABLE = (
    "slurm.partition=low-cancel-now",
    "slurm.exclude=node[3-4]",
    "slurm.gpus_per_node=2",
    "slurm.heal.partition=first",
)
LOSABLE = ("slurm.partition=last", "slurm.heal.partition=first")
# What is in store for each chain, as the stand-in reads it, and its settings.
FAULTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raises": ("sft 6 raise device-side assert", HERE),
    "mistaken": ("sft 2 mistake data.json: no such file", (*ALONE, *HERE)),
    "preempted": ("sft 6 wait", (*ALONE, *PREEMPTABLE)),
    "out-of-time": ("sft 6 wait", (*ALONE, *HERE)),
    "cancelled": ("sft 6 wait", (*ALONE, *HERE)),
    "requeued": ("sft 6 wait", (*ALONE, *HERE)),
    "killed": ("sft 6 die", (*ALONE, *HERE)),
    "node-lost": ("sft 6 wait", (*ALONE, *LOSABLE)),
}


@dataclass(frozen=True)
class StandIn(Chain):
    """A chain of stand-ins."""

    @property
    def fault(self) -> Path:
        return self.path.with_suffix(".fault")

    @property
    def env(self) -> dict[str, str]:
        return {**self.cluster.env, "PYTHONPATH": str(STAND_IN), "STAND_IN_FAULT": str(self.fault)}

    def await_fault(self) -> str:
        """Wait until SFT has come to its fault, and return its job."""
        self.await_that(lambda: self.steps("sft")[-1:] == [5], "SFT is at its fault")
        return self.job_id("sft")

    def await_end(self, stage: str = "sft") -> None:
        self.await_that(lambda: self.is_done(stage), f"{stage} is done")

    def await_event(self, event: str, times: int = 1) -> None:
        self.await_that(lambda: len(self.events(event, "sft")) >= times, f"the ledger says {event} of sft")

    def await_stop(self) -> str:
        """What status says once the chain has stopped."""
        self.await_that(lambda: self.events("stopped", "sft"), "the chain has stopped")
        return str(self.status()["sft"]["why"])

    def endings(self) -> list[tuple[str, int]]:
        """How SFT's attempts ended, and after which steps."""
        return [(event["reason"], event["step"]) for event in self.events("ended", "sft")]

    def await_that(self, holds: Callable[[], object], what: str) -> None:
        try:
            wait_until(holds, PATIENCE, what)
        except ClusterError as error:
            queue = self.cluster.run("squeue", "--states=all", "--format=%i %j %T %r %E").stdout
            logs = "".join(log.read_text() for log in self.path.glob("stages/*/logs/*.out"))
            raise ClusterError(f"{error}\n{queue}\n{self.run.ledger.read_text()}\n{logs}") from None

    def sentinels(self) -> list[str]:
        """The ids of SFT's sentinels that wait."""
        token = self.events("submitting", "sft")[-1]["token"]
        lines = self.cluster.run("squeue", "-h", "-t", "PD", "--format=%i %k").stdout.splitlines()
        return [line.split()[0] for line in lines if line.endswith(f"hpc-rlhf-sentinel:{token}")]


@pytest.fixture(scope="module")
def chains(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StandIn]]:
    folder = tmp_path_factory.mktemp("mend")
    made = {}
    for name, (fault, sets) in FAULTS.items():
        made[name] = chain = StandIn(cluster, SPEC, folder / name, (f"name={name}", *sets))
        chain.fault.write_text(fault)
        chain.submit(env=chain.env)
    lost = cluster.field(made["node-lost"].await_fault(), "NodeList")
    cluster.kill_node(lost)  # Slurm takes half a minute to see that; meanwhile the other tests run
    yield made
    if not cluster.daemons()[lost].alive:
        cluster.start_node(lost)
    cluster.clear()


def test_a_preempted_job_that_was_killed_at_once_goes_on(chains: dict[str, StandIn]) -> None:
    chain = chains["preempted"]
    job = chain.await_fault()
    node = chain.cluster.field(job, "NodeList")
    chain.cluster.sbatch("--partition=high", f"--nodelist={node}", "--gpus-per-node=2", "--output=/dev/null", "--wrap=true")  # fmt: skip
    chain.await_event("ended")
    chain.fault.unlink()
    chain.await_end()
    assert chain.endings() == [("preempted", 5)]
    assert chain.job_id("sft") == job
    assert chain.steps("sft") == [*range(1, 6), *range(5, 13)]


def test_a_job_cut_at_its_limit_without_a_signal_goes_on(chains: dict[str, StandIn]) -> None:
    chain = chains["out-of-time"]
    job = chain.await_fault()
    chain.cluster.run("scontrol", "update", f"job={job}", "EndTime=now+1")
    chain.await_event("retried")
    chain.cluster.run("scontrol", "update", f"job={job}", "TimeLimit=10")
    chain.fault.unlink()
    chain.await_end()
    assert chain.endings() == [("time limit", 5)]


def test_what_a_person_cancelled_stays_so_until_a_person_says_otherwise(chains: dict[str, StandIn]) -> None:
    chain = chains["cancelled"]
    job = chain.await_fault()
    chain.cluster.run("scancel", job)
    assert chain.await_stop() == "cancelled by hand; once that is mended, hpc-rlhf heal goes on"
    assert not chain.events("retried", "sft")
    chain.fault.unlink()
    chain.cli("heal", chain.path, env=chain.env)
    chain.await_end()
    assert chain.events("resumed", "sft")[-1]["step"] == 4


def test_a_requeue_from_outside_is_told_and_a_cancelled_sentinel_comes_back(
    chains: dict[str, StandIn],
) -> None:
    chain = chains["requeued"]
    job = chain.await_fault()
    chain.cluster.run("scancel", *chain.sentinels())
    chain.await_that(lambda: not chain.sentinels(), "the sentinel is gone")
    chain.cluster.run("scontrol", "requeue", job)
    chain.await_event("started", 2)
    chain.await_that(chain.sentinels, "the sentinel is back")
    chain.fault.unlink()
    chain.await_end()
    assert chain.endings() == [("requeued by hand", 5)]


def test_a_killed_rank_is_tried_again(chains: dict[str, StandIn]) -> None:
    chain = chains["killed"]
    chain.await_end()
    assert chain.endings() == [("killed", 5)]
    assert "Killed" in chain.events("ended", "sft")[0]["message"]
    assert len(chain.events("started", "sft")) == 2


def test_a_users_mistake_is_not_tried_again(chains: dict[str, StandIn]) -> None:
    chain = chains["mistaken"]
    why = chain.await_stop()
    assert why == "user error: data.json: no such file; once that is mended, hpc-rlhf heal goes on"
    assert len(chain.events("started", "sft")) == 1


def test_a_stage_that_fails_twice_alike_stops_and_goes_on_when_it_is_mended(
    chains: dict[str, StandIn],
) -> None:
    chain = chains["raises"]
    why = chain.await_stop()
    assert why.startswith("failed twice at step 5: RuntimeError: device-side assert;")
    assert len(chain.events("started", "sft")) == 2
    chain.await_end("reward")
    chain.await_that(lambda: chain.status()["ppo"]["state"] == "stuck", "status shows that PPO cannot start")
    chain.fault.unlink()
    told = json.loads(chain.cli("heal", chain.path, "--json", env=chain.env).stdout)
    assert [each["did"] for each in told] == ["requeued", "done", "live"]
    for stage in ("sft", "ppo"):
        chain.await_end(stage)
    assert chain.events("resumed", "sft")[-1]["step"] == 4
    chain.await_that(lambda: not chain.sentinels(), "no sentinel is left")


def test_a_stage_whose_node_died_goes_on_elsewhere(chains: dict[str, StandIn]) -> None:
    chain = chains["node-lost"]
    lost = next(name for name, daemon in chain.cluster.daemons().items() if not daemon.alive)
    chain.await_event("started", 2)
    assert chain.cluster.field(chain.job_id("sft"), "NodeList") != lost
    chain.await_that(chain.sentinels, "a sentinel watches over the new attempt")
    chain.cluster.start_node(lost)  # ends what still runs there
    chain.fault.unlink()
    chain.await_end()
    assert chain.endings() == [("node failure", 5)]
    assert chain.events("ended", "sft")[0]["node"] == lost
