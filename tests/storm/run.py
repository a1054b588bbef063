"""A chain in peace and the same chain in storms, each on a small file system of its own."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.cluster import Cluster, wait_until
from tests.cluster.chain import Chain
from tests.storm.storm import STAGES, Storm
from tests.storm.strikes import FAULTS, Fault
from tests.storm.verdict import differences, table, unexplained

HERE = Path(__file__).parent
DISK = "256m"
# Steps that a stage makes in the time in which a storm has one strike, and at least.
STEPS = {"sft": (60, 40), "reward": (60, 40), "ppo": (6, 12)}


@dataclass(frozen=True)
class Outcome:
    """What a storm has cost.

    Attributes:
        wrong: all that is not as it should be.
        healed: what status said each time that a person had to heal.
    """

    storm: Storm
    wrong: list[str]
    healed: list[str]
    table: str


@dataclass
class Weather:
    """Chains on a cluster.

    Attributes:
        faults: strikes of a storm; the chains are as long as it takes to receive them.
        library: the shim.
    """

    cluster: Cluster
    folder: Path
    faults: int
    library: Path

    def peace(self, kept: Path | None = None) -> Chain:
        """Run the chain undisturbed, unless it was kept from another time."""
        chain = Chain(self.cluster, HERE / "storm.yaml", kept) if kept else self._chain("peace")
        if not kept:
            chain.submit()
        for stage in STAGES:
            wait_until(partial(chain.is_done, stage), 3600, f"{stage} is done")
        self._peace = chain
        return chain

    def storm(self, seed: int, kinds: Sequence[Fault] = FAULTS, every: float | None = None) -> Outcome:
        """Run it in a storm."""
        name = f"storm-{seed}"
        chain = self._chain(name)
        storm = Storm(chain, self.folder / f"{name}-orders", random.Random(seed), self.faults, kinds, every)
        chain.submit()
        storm.rage()
        wrong = [*differences(chain, self._peace), *unexplained(storm)]
        if len(storm.struck) < self.faults:
            wrong.append(f"the chain was over after {len(storm.struck)} strikes")
        return Outcome(storm, wrong, storm.healed, table(storm))

    def _chain(self, name: str) -> Chain:
        place = self.folder / name
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", place], check=True)
        sets = [f"name={name}"]
        for stage, (each, least) in STEPS.items():
            orders = self.folder / f"{name}-orders" / stage
            orders.mkdir(parents=True)
            setup = f'["export OMP_NUM_THREADS=1 STORM={orders} LD_PRELOAD={self.library}"]'
            steps = max(least, each * self.faults // len(STEPS))
            sets += [f"stages.{stage}.max_steps={steps}", f"stages.{stage}.slurm.setup={setup}"]
        return Chain(self.cluster, HERE / "storm.yaml", place / "run", tuple(sets))


@contextmanager
def weather(cluster: Cluster, folder: Path, faults: int) -> Iterator[Weather]:
    """Chains on a cluster; their file systems are gone afterwards."""
    library = folder / "shim.so"
    compiler = shutil.which("cc")
    assert compiler is not None, "a storm needs a C compiler for its shim"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    sky = Weather(cluster, folder, faults, library)
    try:
        yield sky
    finally:
        cluster.clear()
        for place in folder.iterdir():
            if place.is_mount():
                subprocess.run(["umount", place], check=True)
