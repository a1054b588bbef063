"""What all tests share: the Slurm cluster, and the rule that nothing they start stays behind."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.cluster import Cluster, why_not
from tests.cluster.processes import Process, find, kill_and_wait

# A shell that starts the tests in the background has them ignore these, and so would all that they start and interrupt.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# How long an example takes says how busy the machine is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

REQUIRE_SLURM = "HPC_RLHF_REQUIRE_SLURM"
# What a user's runs are noted in is not the tests' to fill.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="hpc-rlhf-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
# Every process that a test starts inherits this, jobs on the cluster included.
SESSION_MARK = "HPC_RLHF_TEST_SESSION"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU. Run all tests of the Slurm cluster on one worker: they share one cluster."""
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """Fail the run when a process that its tests started is still there at its end."""
    me = Process.of(os.getpid())
    assert me is not None
    mark = f"{me.pid}.{me.started}"
    os.environ[SESSION_MARK] = mark

    def left() -> list[Process]:
        # Python's own helper of this process; it ends with it.
        return [
            process
            for process in find(lambda process: f"{SESSION_MARK}={mark}" in process.environ())
            if "multiprocessing.resource_tracker" not in process.command()
        ]

    yield
    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    strays = left()
    names = [f"{process.pid}: {process.command()}" for process in strays]
    kill_and_wait(strays)
    assert not names, "tests left these processes running: " + "; ".join(names)


@pytest.fixture(scope="session")
def cluster(_nothing_left_running: None) -> Iterator[Cluster]:
    """The Slurm cluster, started at first use. Jobs of other tests may be on it: see ``idle_cluster``."""
    reason = why_not()
    if reason is not None and os.environ.get(REQUIRE_SLURM) == "1":
        pytest.fail(f"{REQUIRE_SLURM}=1, but {reason}")
    if reason is not None:
        pytest.skip(f"no Slurm cluster: {reason}")
    with Cluster(Path(tempfile.mkdtemp(prefix="hpc-rlhf-slurm-")), owner=os.getpid()) as started:
        yield started


@pytest.fixture
def idle_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster without jobs, and left so."""
    yield cluster
    cluster.clear()


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder whose path is short enough for sockets; pytest's own may not be."""
    with tempfile.TemporaryDirectory(prefix="hpc-rlhf-") as folder:
        yield Path(folder)
