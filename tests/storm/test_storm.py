"""A short storm: what `make chaos` does for long."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.storm.run import Weather, weather

FAULTS, SEED = 8, 5


@pytest.fixture
def sky(idle_cluster: Cluster) -> Iterator[Weather]:
    with (
        tempfile.TemporaryDirectory(prefix="hpc-rlhf-") as folder,
        weather(idle_cluster, Path(folder), FAULTS) as sky,
    ):
        yield sky


def test_a_chain_in_a_storm_ends_as_in_peace(sky: Weather) -> None:
    """Its models are the same to the bit, its metrics to the last digit, and its ledger gives each interruption its reason."""
    sky.peace()
    outcome = sky.storm(SEED)
    assert not outcome.wrong, outcome.table
    assert len(outcome.storm.struck) >= FAULTS
