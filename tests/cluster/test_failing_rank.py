"""When one rank fails, srun ends the others: up to 25.11 with SIGKILL, from 26.05 on first with the signal of a
preemption, which must not pass for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.cluster.test_heal import ALONE, AT, SPEC, StandIn

pytestmark = pytest.mark.generations


def test_the_word_of_the_rank_that_failed_counts(idle_cluster: Cluster, tmp_path: Path) -> None:
    chain = StandIn(idle_cluster, SPEC, tmp_path / "run", (*ALONE, "slurm.ranks_per_node=3"))
    for count, (step, text) in enumerate(zip(AT, ("no such tensor", "bad row"), strict=True), 1):
        chain.store(f"sft {step + 1} wait")
        if count == 1:
            chain.submit(env=chain.env)
        chain.await_fault(step)
        chain.store(f"sft {step + 1} wait\npeer 1 raise {text}")
        chain.await_endings(count)
    chain.store("")
    chain.await_end()
    assert [reason for reason, _ in chain.endings()] == ["failed", "failed"]
    messages = [event.message for event in chain.events("ended", "sft")]
    assert messages == ["RuntimeError: no such tensor", "RuntimeError: bad row"]
    assert len(chain.events("retried", "sft")) == 2
