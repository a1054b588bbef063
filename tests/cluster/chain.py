"""A run of hpc-rlhf on the test cluster, driven by its command line and watched through its run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Failed, Hang, Stopped
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from tests.cluster import config
from tests.cluster.cluster import CHECKOUT, SUCCEEDED, Cluster, ClusterError, wait_until

# Each rank spends some 10 s of CPU time importing torch and DeepSpeed, while other tests run beside it.
STAGE_SECONDS = 360


class Watched:
    """A run, observed through its directory."""

    path: Path

    @property
    def run(self) -> RunDir:
        return RunDir(self.path)

    def events(self, event: str, stage: str) -> list[Any]:
        return [record for record in Ledger(self.run.ledger).events(stage) if record.name == event]

    def job_id(self, stage: str) -> str:
        return str(self.events("submitted", stage)[-1].job_id)

    def steps(self, stage: str) -> list[int]:
        """The training steps in the stage's metrics, in the order written."""
        try:
            lines = self.run.stage(stage).metrics.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row["step"] for row in rows if row["kind"] == "train"]

    def is_done(self, stage: str) -> bool:
        return manifest.defect(self.run.stage(stage).model) is None


@dataclass(frozen=True)
class Chain(Watched):
    """A run on the cluster: its spec, its directory and the overrides it is submitted with."""

    cluster: Cluster
    spec: Path
    path: Path
    sets: tuple[str, ...] = ()

    def cli(
        self, verb: str, *args: str | Path, check: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Call hpc-rlhf in a process of its own, against the cluster."""
        done = subprocess.run(
            [sys.executable, "-m", "hpc_rlhf.cli", verb, *map(str, args)],
            env=self.cluster.env if env is None else env,
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{verb} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    @property
    def submission(self) -> list[str]:
        """What `hpc-rlhf submit` is called with. --force, because a storm's disk is small."""
        sets = [word for each in (f"run_dir={self.path}", *self.sets) for word in ("--set", each)]
        return [str(self.spec), "--force", *sets]

    def submit(self, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return self.cli("submit", *self.submission, check=check, env=env)

    def status(self) -> dict[str, dict[str, Any]]:
        """`hpc-rlhf status --json`, by stage."""
        stages = json.loads(self.cli("status", self.path, "--json").stdout)["stages"]
        return {stage["stage"]: stage for stage in stages}

    # Waiting --------------------------------------------------------------------------------------

    def wait_step(self, stage: str, step: int) -> None:
        self.wait(stage, lambda: max(self.steps(stage), default=0) >= step, f"{stage} is at step {step}")

    def wait_done(self, stage: str, seconds: float = STAGE_SECONDS) -> None:
        self.wait(stage, lambda: self.is_done(stage), f"{stage} is done", seconds=seconds)

    def wait_event(self, event: str, stage: str) -> Any:
        self.wait(stage, lambda: self.events(event, stage), f"the ledger has {event} for {stage}", event)
        return self.events(event, stage)[-1]

    def wait(
        self, stage: str, holds: Callable[[], object], what: str, event: str = "", seconds: float = STAGE_SECONDS
    ) -> None:
        """Wait, but give up once it can no longer happen; the error shows logs and queue."""

        def holds_or_impossible() -> bool:
            if holds():
                return True
            history = list(Ledger(self.run.ledger).events())
            hung = {event.attempt for event in history if isinstance(event, Hang)}  # its peers fail as well
            failed = [event for event in history if isinstance(event, Failed) and event.attempt not in hung]
            stopped = isinstance(next((each for each in reversed(history) if each.stage == stage), None), Stopped)
            if (failed and event != "failed") or (stopped and event != "stopped"):
                raise ClusterError(f"a stage failed before {what}")
            if self.is_done(stage) and not holds():
                raise ClusterError(f"{stage} has finished without this: {what}")
            return False

        try:
            wait_until(holds_or_impossible, seconds, what, every=0.1)
        except ClusterError as error:
            queue = self.cluster.run("squeue", "--format=%i %j %T %r").stdout
            raise ClusterError(f"{error}\n{queue}\n{self.run.ledger.read_text()}\n{self.log_tails(stage)}") from None

    def log_tails(self, stage: str) -> str:
        logs = sorted(self.run.stage(stage).logs.glob("*_log.*"))
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]) for log in logs
        )


def run_preempted(chain: Chain, nodes: str) -> dict[str, Any]:
    """Run a chain's SFT on its own nodes and preempt it once; returns the model's manifest."""
    chain.submit()
    chain.wait_step("sft", 5)
    whole = (f"--nodelist={nodes}", f"--gpus-per-node={config.GPUS}")
    chain.cluster.sbatch("--partition=high", *whole, "--output=/dev/null", "--wrap=true")
    chain.wait_done("sft")
    chain.cluster.wait_state(chain.job_id("sft"), SUCCEEDED)
    return manifest.require(chain.run.stage("sft").model, "the model")


def assert_went_on_once(chain: Chain, ranks: int) -> None:
    """Assert that SFT was preempted once, requeued itself, and resumed without missing or repeating a step."""
    starts = chain.events("started", "sft")
    assert [(start.restart, start.ranks) for start in starts] == [(0, ranks), (1, ranks)]
    (requeued,), (resumed,) = chain.events("requeued", "sft"), chain.events("resumed", "sft")
    assert requeued.reason == "preempted"
    assert resumed.step == requeued.step >= 5
    facts = manifest.require(chain.run.stage("sft").model, "the model")
    assert chain.steps("sft") == list(range(1, facts["step"] + 1))
