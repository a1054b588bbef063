"""A stage that a node failed to launch is held by Slurm: `status` says so, and `heal` and `submit` release it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.cluster.test_heal import ALONE, SPEC, StandIn

pytestmark = pytest.mark.generations


@pytest.mark.parametrize("verb", ["heal", "submit"])
def test_a_failed_launch_is_shown_and_released(idle_cluster: Cluster, tmp_path: Path, verb: str) -> None:
    chain = StandIn(idle_cluster, SPEC, tmp_path / "run", (*ALONE, "slurm.nodelist=node4"))
    with idle_cluster.broken_node("node4"):
        chain.submit(env=chain.env)
        chain.await_that(lambda: chain.status()["sft"]["state"] == "held", "Slurm holds the job")
        assert "a node failed to launch it; to release it, run hpc-rlhf heal" in chain.status()["sft"]["why"]
    if verb == "heal":
        chain.cli("heal", chain.path, env=chain.env)
    else:
        chain.submit(env=chain.env)
    chain.await_end()
    assert len(chain.events("submitted", "sft")) == 1
