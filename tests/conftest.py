"""Shared fixtures: the Slurm cluster, a world of one rank, and a check that tests leave no processes behind."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from hpc_rlhf.spec.rollout import RolloutSpec, interpreter
from tests.cluster import Cluster, why_not
from tests.cluster.processes import Process, find, kill_and_wait

if TYPE_CHECKING:
    from hpc_rlhf.train.runtime.world import World

# A background shell makes the tests ignore these signals, and everything they start would inherit that.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# An example's duration only shows how busy the machine is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

REQUIRE_SLURM, REQUIRE_VLLM = "HPC_RLHF_REQUIRE_SLURM", "HPC_RLHF_REQUIRE_VLLM"
# Keep the tests' runs out of the user's index of runs.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="hpc-rlhf-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
# Inherited by every process that a test starts, including jobs on the cluster.
SESSION_MARK = "HPC_RLHF_TEST_SESSION"


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user of this machine can enter, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory(prefix="hpc-rlhf-public-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Cut ids of megabytes, which every worker would collect and report."""
    return f"{val[:60]!r}..." if isinstance(val, (str, bytes)) and len(val) > 500 else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU. Run all tests of the Slurm cluster on one worker, which share one cluster,
    and those of each other file on one, which share the file's fixtures."""
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.xdist_group("slurm"))
        elif not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    items.sort(key=lambda item: not item.get_closest_marker("slurm"))  # the longest group first


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """Fail the session if a process that its tests started is still running at the end."""
    me = Process.of(os.getpid())
    assert me is not None
    mark = f"{me.pid}.{me.started}"
    os.environ[SESSION_MARK] = mark

    def exits_with_this(process: Process) -> bool:
        command = process.command()
        if "multiprocessing.forkserver" in command:  # also that of the ranks that it forked
            return process.parent == me.pid
        return "multiprocessing.resource_tracker" in command

    def leftovers() -> list[Process]:
        ours = find(lambda process: f"{SESSION_MARK}={mark}" in process.environ())
        return [process for process in ours if not exits_with_this(process)]

    yield
    deadline = time.monotonic() + 10
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.2)
    strays = leftovers()
    names = [f"{process.pid}: {process.command()}" for process in strays]
    kill_and_wait(strays)
    assert not names, "tests left these processes running: " + "; ".join(names)


@pytest.fixture(scope="session")
def cluster(_nothing_left_running: None) -> Iterator[Cluster]:
    """The Slurm cluster, started at first use. It may still run jobs of other tests; see ``idle_cluster``."""
    reason = why_not()
    if reason is not None and os.environ.get(REQUIRE_SLURM) == "1":
        pytest.fail(f"{REQUIRE_SLURM}=1, but {reason}")
    if reason is not None:
        pytest.skip(f"no Slurm cluster: {reason}")
    with Cluster(Path(tempfile.mkdtemp(prefix="hpc-rlhf-slurm-")), owner=os.getpid()) as started:
        yield started


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the state of Slurm below a failure of a test that uses it."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        report.sections.append(("Slurm", cluster.describe()))
    return report


@pytest.fixture
def idle_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; its jobs are cancelled afterwards."""
    yield cluster
    cluster.clear()


@pytest.fixture(scope="session")
def vllm() -> None:
    """The real vLLM; see ``make install-vllm``."""
    python = interpreter(RolloutSpec(engine="vllm"))
    if os.path.exists(python):
        return
    if os.environ.get(REQUIRE_VLLM) == "1":
        pytest.fail(f"{REQUIRE_VLLM}=1, but there is no {python}")
    pytest.skip(f"no vLLM: there is no {python}; make install-vllm makes it")


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder with a path short enough for sockets, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="hpc-rlhf-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """This process alone, joined by gloo without a launcher or a port."""
    import torch
    import torch.distributed as dist

    from hpc_rlhf.train.runtime.world import ParallelDims, World

    meeting = tmp_path_factory.mktemp("world") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield World(0, ParallelDims(1), torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()
