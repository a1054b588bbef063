"""A short storm: what `make chaos` does for long."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.storm.run import Weather, weather
from tests.storm.storm import STAGES
from tests.storm.strikes import FAULTS
from tests.storm.verdict import interruptions

STRIKES, SEED = 5, 5
EVERY = 6.0  # seconds: no attempt is over by then, on a fast machine either
# Those that end an attempt within seconds.
QUICK = [
    fault
    for fault in FAULTS
    if fault.name
    in ("kill a rank", "aim", "preempt", "preempt at once", "requeue from outside", "spoil a checkpoint")
]


@pytest.fixture
def sky(idle_cluster: Cluster) -> Iterator[Weather]:
    with (
        tempfile.TemporaryDirectory(prefix="hpc-rlhf-") as folder,
        weather(idle_cluster, Path(folder), STRIKES, EVERY) as sky,
    ):
        yield sky


def test_a_chain_in_a_storm_ends_as_in_peace(sky: Weather) -> None:
    """Its models are the same to the bit, its metrics to the last digit, and no interruption is without a reason."""
    sky.peace()
    outcome = sky.storm(SEED, QUICK)
    assert not outcome.differ, outcome.table
    ended = [each for stage in STAGES for each in interruptions(outcome.storm.chain, stage)]
    assert ended, outcome.table
    assert all(each.reason for each in ended), outcome.table
