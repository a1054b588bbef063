"""A job that requeued itself while it was preempted. From Slurm 24.05 on it is PREEMPTED at its next end, whatever that
was, and where preemption requeues, it runs once more. The chain goes by what really happened.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import Cluster
from tests.cluster.cluster import SUCCEEDED
from tests.cluster.test_heal import FOLLOWED, SPEC, StandIn

pytestmark = pytest.mark.generations

# What SFT does after its preemption, and settings.
CHAINS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ends-requeue": ("low", "", ("slurm.heal.enabled=false",)),
    "ends-cancel": ("low-cancel", "", ("slurm.heal.enabled=false",)),
    "fails-requeue": ("low", "sft 10 raise no such tensor", ("slurm.heal.partition=last",)),
    "fails-cancel": ("low-cancel", "sft 10 raise no such tensor", ("slurm.heal.partition=last",)),
    "mistaken-requeue": ("low", "sft 10 mistake data.json: no such file", ("slurm.heal.partition=last",)),
    "mistaken-cancel": ("low-cancel", "sft 10 mistake data.json: no such file", ("slurm.heal.partition=last",)),
}


@pytest.fixture(scope="module")
def chains(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StandIn]]:
    """All chains, after a preemption of their SFT in which it saved and requeued itself."""
    folder = tmp_path_factory.mktemp("stale")
    chains = {}
    for name, (partition, _, sets) in CHAINS.items():
        where = (f"slurm.partition={partition}", "slurm.nodelist=node1", "slurm.gpus_per_node=0")
        chains[name] = chain = StandIn(cluster, SPEC, folder / name, (f"name={name}", *FOLLOWED, *where, *sets))
        chain.store("sft 6 wait")
        chain.submit(env=chain.env)
    for chain in chains.values():
        chain.await_fault()
    cluster.sbatch("--partition=high", "--nodelist=node1", "--exclusive", "--output=/dev/null", "--wrap=true")
    for name, chain in chains.items():
        chain.await_endings(1)
        chain.store(CHAINS[name][1])
    yield chains
    cluster.clear()


@pytest.mark.parametrize("name", ["ends-requeue", "ends-cancel"])
def test_a_stage_that_ends_lets_its_dependents_start_without_healing(chains: dict[str, StandIn], name: str) -> None:
    """And without starting once more before them."""
    chain = chains[name]
    chain.await_end("dpo")
    job = chain.job_id("sft")
    assert chain.cluster.state(job) in SUCCEEDED
    assert chain.cluster.field(job, "Restarts") == "1"
    assert len(chain.events("submitted", "dpo")) == 1


@pytest.mark.parametrize("name", ["fails-requeue", "fails-cancel"])
def test_a_stage_that_fails_is_blamed_and_stops(chains: dict[str, StandIn], name: str) -> None:
    chain = chains[name]
    assert chain.await_stop().startswith("failed twice at step 9: RuntimeError: no such tensor;")
    assert [event.reason for event in chain.events("ended", "sft")] == ["failed", "failed"]


@pytest.mark.parametrize("name", ["mistaken-requeue", "mistaken-cancel"])
def test_a_users_mistake_is_found_at_once(chains: dict[str, StandIn], name: str) -> None:
    chain = chains[name]
    assert chain.await_stop().startswith("user error: data.json: no such file;")
    assert len(chain.events("started", "sft")) == 2
