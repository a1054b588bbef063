"""Runs a chain undisturbed and in storms, each on its own small file system."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.run.layout import RunDir
from tests.cluster import Cluster, wait_until
from tests.cluster.chain import Chain, Watched
from tests.cluster.processes import find, kill_and_wait
from tests.cluster.replay import keeping, replay
from tests.storm.here import Here
from tests.storm.scenarios import PPO, Scenario
from tests.storm.storm import ClusterStorm, LocalStorm, Storm
from tests.storm.strikes import FAULTS, LOCAL_FAULTS, Fault
from tests.storm.verdict import differences, still_running, table, unexplained

HERE = Path(__file__).parent
DISK = "256m"
LONGER_HERE = 3  # times: no stage queues, and so an attempt is over sooner


@dataclass(frozen=True)
class Outcome:
    """The result of a storm.

    Attributes:
        differ: differences from the undisturbed chain.
        odd: interruptions with the wrong reason, processes that were left, and faults there was no time for.
        healed: the status each time the user had to heal.
    """

    storm: Storm
    differ: list[str]
    odd: list[str]
    healed: list[str]
    table: str


@dataclass(frozen=True)
class Kept(Watched):
    """A finished run."""

    path: Path


@dataclass
class Weather:
    """Chains on a cluster, or on this machine without one.

    Attributes:
        faults: number of faults in a storm; the chains are long enough for all of them.
        library: the shim.
        every: seconds into an attempt when a fault strikes; a random moment when left out.
        scenario: of the chains.
    """

    cluster: Cluster | None
    folder: Path
    faults: int
    library: Path
    every: float | None = None
    scenario: Scenario = PPO

    @property
    def stages(self) -> tuple[str, ...]:
        return self.scenario.stages

    def peace(self, kept: Path | None = None) -> None:
        """Run the chain undisturbed, unless an earlier run was kept."""
        self._peace = self._finished(Kept(kept or self._started("peace").path))

    def storm(self, seed: int, kinds: Sequence[Fault] | None = None) -> Outcome:
        """Run it in a storm and compare."""
        storm = self.rage(seed, kinds, {stage: self._steps(stage) for stage in self.stages})
        if self.scenario.replays:
            name = f"peace-{seed}"
            self._peace = self._finished(Kept(self._started(name, self._rollouts(f"storm-{seed}")).path))
        differ, odd = differences(storm.chain, self._peace, self.stages), [*unexplained(storm), *still_running(storm)]
        if len(storm.struck) < self.faults:
            odd.append(f"the chain finished after {len(storm.struck)} faults")
        return Outcome(storm, differ, odd, storm.healed, table(storm))

    def rage(self, seed: int, kinds: Sequence[Fault] | None = None, steps: Mapping[str, int] | None = None) -> Storm:
        """Run it in a storm; ``steps`` as in Storm."""
        name = f"storm-{seed}"
        chain = self._started(name)
        arguments = (self.folder / f"{name}-orders", random.Random(seed), self.faults, self.scenario)
        more = self.scenario.faults
        storm: Storm
        if isinstance(chain, Chain):
            storm = ClusterStorm(chain, *arguments, kinds or (*FAULTS, *more), self.every, steps or {})
        else:
            storm = LocalStorm(chain, *arguments, kinds or (*LOCAL_FAULTS, *more), self.every, steps or {})
        kept = keeping(chain.run.stage(self.stages[-1]), self._rollouts(name))
        with kept if self.scenario.replays else nullcontext():
            storm.rage()
        return storm

    def _rollouts(self, name: str) -> Path:
        """Where a chain's rollouts are kept."""
        return self.folder / name / "rollouts"

    def _finished(self, chain: Kept) -> Kept:
        wait_until(lambda: all(chain.is_done(stage) for stage in self.stages), 7200, "the run in peace is done")
        return chain

    def _steps(self, stage: str) -> int:
        pace = self.scenario.paces[stage]
        seconds = (self.every or pace.seconds) * (1 if self.cluster else LONGER_HERE)
        return max(pace.least, int(pace.rate * seconds * self.faults / len(self.stages)))

    def _started(self, name: str, rollouts: Path | None = None) -> Chain | Here:
        """A chain.

        Args:
            rollouts: of another chain, for the last stage to learn from.
        """
        place, orders = self.folder / name, self.folder / f"{name}-orders"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", place], check=True)
        sets, path = [f"name={name}"], place / "run"
        env = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(self.library), **self.scenario.env}
        for stage in self.stages:
            (orders / stage).mkdir(parents=True)
            setup = " ".join(f"{key}={value}" for key, value in {**env, "STORM": orders / stage}.items())
            sets += [f"stages.{stage}.max_steps={self._steps(stage)}", f'stages.{stage}.slurm.setup=["export {setup}"]']
        if rollouts is not None:
            stage = self.stages[-1]
            python = replay(RunDir(path).stage(stage), rollouts, self.folder / f"{name}-vllm")
            sets.append(f"stages.{stage}.rollout.python={python}")
        chain: Chain | Here
        spec = HERE / self.scenario.spec
        if self.cluster is not None:
            chain = Chain(self.cluster, spec, path, tuple(sets))
            chain.submit()
        else:
            chain = Here(spec, path, tuple(sets), {**env, "STORM": str(orders)})
            chain.start()
        return chain


@contextmanager
def weather(
    cluster: Cluster | None, folder: Path, faults: int, every: float | None = None, scenario: Scenario = PPO
) -> Iterator[Weather]:
    """Chains on a cluster or on this machine; their file systems are removed afterwards."""
    library = folder / "shim.so"
    compiler = shutil.which("cc")
    assert compiler is not None, "a storm needs a C compiler for its shim"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    try:
        yield Weather(cluster, folder, faults, library, every, scenario)
    finally:
        if cluster is not None:
            cluster.clear()
        orders = f"STORM={folder}/"
        kill_and_wait(find(lambda process: any(pair.startswith(orders) for pair in process.environ())))
        for place in folder.iterdir():
            if place.is_mount():
                subprocess.run(["umount", "--lazy", place], check=True)
