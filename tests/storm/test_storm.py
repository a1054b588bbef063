"""A short version of `make chaos`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.storm.run import Weather, weather
from tests.storm.scenarios import PPO
from tests.storm.strikes import FAULTS
from tests.storm.verdict import interruptions

STRIKES, SEED = 3, 5
EVERY = 6.0  # seconds: no attempt is over by then, on a fast machine either
# Faults that end an attempt within seconds.
QUICK = [
    fault
    for fault in FAULTS
    if fault.name in ("kill a rank", "aim", "preempt", "preempt at once", "requeue from outside", "spoil a checkpoint")
]


@pytest.fixture
def sky(idle_cluster: Cluster) -> Iterator[Weather]:
    with (
        tempfile.TemporaryDirectory(prefix="hpc-rlhf-") as folder,
        weather(idle_cluster, Path(folder), STRIKES, EVERY) as sky,
    ):
        yield sky


def test_faults_change_neither_weights_nor_metrics(sky: Weather) -> None:
    """Weights and metrics equal those of an undisturbed chain, and every interruption has the right reason."""
    sky.peace()
    outcome = sky.storm(SEED, QUICK)
    assert not outcome.differ, outcome.table
    ended = [each for stage in PPO.stages for each in interruptions(outcome.storm.chain, stage)]
    assert ended, outcome.table
    assert all(each.reason for each in ended), outcome.table
