"""A storm over a chain: injects one fault after another into each running stage until all are used."""

from __future__ import annotations

import math
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_rlhf.run import reasons as causes
from hpc_rlhf.run.events import Ended, Saved
from hpc_rlhf.run.ledger import Ledger
from tests.cluster import ClusterError
from tests.cluster.chain import Chain
from tests.storm import strikes
from tests.storm.here import Here
from tests.storm.scenarios import PPO, Scenario
from tests.storm.strikes import FAULTS, Fault, Victim

EFFECT = 90.0  # seconds that a strike may take to show
ALONE = 15.0  # seconds without a job and a sentinel after which a person looks
MINUTES = "60"  # the time limit that the spec gives


@dataclass
class Struck:
    """A fault that was injected.

    Attributes:
        attempt: the number of the stage's attempt, from 1.
        reasons: the reasons the attempt may then end with.
    """

    fault: str
    stage: str
    attempt: int
    time: float
    reasons: frozenset[str]


@dataclass
class Storm:
    """A series of faults over a chain.

    Attributes:
        faults: how many faults to inject.
        scenario: of the chain.
        kinds: kinds of faults to draw from.
        folder: holds a folder per stage where its shim reads its orders.
        every: seconds into an attempt when a fault strikes; a random moment when left out.
        steps: the steps of each stage that may not finish before its share of the faults; none when left out.
        struck: the faults injected.
        healed: the status each time the user had to heal.
    """

    chain: Chain | Here
    folder: Path
    random: random.Random
    faults: int
    scenario: Scenario = PPO
    kinds: Sequence[Fault] = FAULTS
    every: float | None = None
    steps: Mapping[str, int] = field(default_factory=dict)
    struck: list[Struck] = field(default_factory=list)
    healed: list[str] = field(default_factory=list)
    _fronts: list[Front] = field(default_factory=list)

    @property
    def stages(self) -> tuple[str, ...]:
        return self.scenario.stages

    def rage(self) -> None:
        """Inject all faults, then let the chain finish.

        Raises:
            ClusterError: the chain stands still.
        """
        fronts = self._fronts = [Front(self, stage) for stage in self.stages]
        size, moved = 0, time.monotonic()
        while any(not front.over for front in fronts):
            for front in fronts:
                front.look()
            self._look_after()
            ledger = self.chain.run.ledger
            now = ledger.stat().st_size if ledger.exists() else 0
            if now != size:
                size, moved = now, time.monotonic()
            elif time.monotonic() - moved > self.scenario.still:
                raise ClusterError(f"no progress any more:\n{self._scene()}")
            time.sleep(0.1)

    def hit(self, front: Front, fault: Fault, reasons: frozenset[str]) -> None:
        """Record a fault in a stage, or in all running ones."""
        fronts = [each for each in self._fronts if each is front or (fault.wide and each.begun)]
        self.struck += [Struck(fault.name, each.stage, each.attempt, time.time(), reasons) for each in fronts]
        for each in fronts:
            each.await_effect(self.struck[-1])
        targets = ", ".join(f"{each.stage} attempt {each.attempt}" for each in fronts)
        print(f"{len(self.struck):4} {fault.name}: {targets}", file=sys.stderr, flush=True)

    def is_fair(self, front: Front, fault: Fault) -> bool:
        """Whether the fault cannot cause a second attempt without progress, which would stop the chain."""
        fronts = [each for each in self._fronts if each is front or (fault.wide and each.begun)]
        return not fault.blamed or all(each.made_progress() for each in fronts)

    def orders(self, stage: str) -> Path:
        """Where a stage's shim reads its orders."""
        return self.folder / stage

    def _look_after(self) -> None:
        """Do what the run's user would do."""
        raise NotImplementedError

    def _scene(self) -> str:
        """Logs and state, to find out why there is no progress."""
        return "\n".join([*self.chain.run.ledger.read_text().splitlines()[-40:], *map(str, self.struck[-6:])])


@dataclass
class ClusterStorm(Storm):
    """A storm over a chain of Slurm jobs."""

    chain: Chain
    _alone: dict[str, float] = field(default_factory=dict)
    _looked: float = 0.0

    def _look_after(self) -> None:
        """Heal a chain that can no longer heal itself, such as after its sentinel was cancelled."""
        if time.monotonic() - self._looked < 3:
            return
        self._looked = time.monotonic()
        done = self.chain.cluster.run("squeue", "--noheader", "--format=%j|%T|%r", check=False)
        if done.returncode:
            return
        jobs = [line.split("|") for line in done.stdout.splitlines()]
        alive = {name for name, _, reason in jobs if reason != "DependencyNeverSatisfied"}
        for stage in self.stages:
            names = {f"{self.chain.path.parent.name}.{stage}", f"{self.chain.path.parent.name}.{stage}.sentinel"}
            if self.chain.is_done(stage) or names & alive:
                self._alone.pop(stage, None)
            elif time.monotonic() - self._alone.setdefault(stage, time.monotonic()) > ALONE:
                status = self.chain.status()
                inputs = self.stages[:-1] if stage == self.stages[-1] else ()
                if any(status[need]["state"] not in ("done", "failed", "stopped") for need in inputs):
                    continue  # it waits for them, in vain for now
                self.healed.append(f"{stage} {status[stage]['state']}: {status[stage]['why']}")
                self.chain.cli("heal", self.chain.path)
                self._alone.clear()

    def _scene(self) -> str:
        queue = self.chain.cluster.run("squeue", "--states=all", "--format=%i %j %T %r %E %N").stdout
        return f"{queue}\n{super()._scene()}"


@dataclass
class LocalStorm(Storm):
    """A storm over a run without Slurm."""

    chain: Here

    def orders(self, stage: str) -> Path:
        return self.folder

    def _look_after(self) -> None:
        """Restart the run whenever its launcher has exited."""
        code = self.chain.launcher.poll()
        if code is None or self.chain.is_done(self.stages[-1]):
            return
        last_line = (self.chain.path.parent / "launcher.log").read_text().splitlines()[-1:]
        if code not in (-signal.SIGKILL, 128 + signal.SIGINT):
            self.healed.append(f"exit code {code}: {' '.join(last_line)}")
        time.sleep(1)
        self.chain.start()


class Front:
    """The storm over one stage.

    Attributes:
        attempt: the number of its latest attempt, from 1; 0 before the first.
    """

    def __init__(self, storm: Storm, stage: str) -> None:
        self.storm, self.stage, self.chain = storm, stage, storm.chain
        self.over = False
        self.attempt = 0
        self._fault: Fault | None = None
        self._moment = 0.0
        self._awaited: Struck | None = None
        self._lost_since: float | None = None
        self._limit: int | None = None

    def look(self) -> None:
        """Inject a fault if it is due."""
        if self.over:
            return
        self._hold_back()
        if self.chain.is_done(self.stage):
            self.restore()
            self.over = True
            return
        starts = self.chain.events("started", self.stage)
        if not starts:
            return
        if len(starts) > self.attempt:
            if self._awaited is not None:
                self._give_time(self._awaited, str(starts[-1].job_id), ("PENDING", "RUNNING"))
            self.attempt = len(starts)
            self._plan()
        fault = self._fault
        if self._awaited is not None:
            self._see_to(self._awaited, str(starts[-1].job_id))
        elif fault is not None and time.monotonic() >= self._moment and self.storm.is_fair(self, fault):
            self._strike(str(starts[-1].job_id), fault)
        self._bring_back()

    @property
    def begun(self) -> bool:
        """Whether it may have a running attempt."""
        return self.attempt > 0 and not self.over

    def made_progress(self) -> bool:
        """Whether a later step was saved since the last ending that counts against the stage."""
        events = list(Ledger(self.chain.run.ledger).events(self.stage))
        blamed = [
            index
            for index, event in enumerate(events)
            if isinstance(event, Ended) and event.reason not in causes.BLAMELESS
        ]
        if not blamed:
            return True
        before, after = (
            max((event.step for event in part if isinstance(event, Saved)), default=0)
            for part in (events[: blamed[-1]], events[blamed[-1] :])
        )
        return after > before

    def await_effect(self, struck: Struck) -> None:
        """Inject nothing until the next attempt if this fault ends the current one."""
        if struck.reasons:
            self._fault, self._awaited, self._moment = None, struck, time.monotonic()
        else:
            self._plan()

    def restore(self) -> None:
        """Undo what faults have left behind."""
        (self._orders / "aim").unlink(missing_ok=True)
        self._lost_since = self._lost_since and -math.inf
        self._bring_back()

    @property
    def _orders(self) -> Path:
        return self.storm.orders(self.stage)

    def _hold_back(self) -> None:
        """Keep some of the stage's steps for each fault that is to strike by its end: a storm is as long as its faults,
        however fast the machine, and after each there is progress."""
        if self.stage not in self.storm.steps:
            return
        total = self.storm.steps[self.stage]
        stages = self.storm.stages
        by_its_end = math.ceil(self.storm.faults * (stages.index(self.stage) + 1) / len(stages))
        left = max(0, by_its_end - len(self.storm.struck))
        limit = total - left * (total // (by_its_end + 2))
        if limit != self._limit:
            self._limit = limit
            draft = self._orders / f"hold.{self.stage}.draft"
            draft.write_text(str(limit))
            draft.rename(self._orders / f"hold.{self.stage}")

    def _plan(self) -> None:
        storm = self.storm
        (self._orders / "aim").unlink(missing_ok=True)
        self._fault = self._awaited = None
        # Leave a share for the last stage.
        stages = storm.stages
        share = 1 if self.stage == stages[-1] else (len(stages) - 1) / len(stages)
        if len(storm.struck) < storm.faults * share:
            self._fault = storm.random.choices(storm.kinds, [fault.weight for fault in storm.kinds])[0]
            self._moment = time.monotonic() + (storm.every or storm.random.uniform(0, storm.scenario.span))

    def _strike(self, job: str, fault: Fault) -> None:
        victim = Victim(self.chain, self.stage, job, self.storm.random, self._orders)
        try:
            reasons = fault.strike(victim)
        except ClusterError as error:
            print(f"     {fault.name} could not be injected: {error}", file=sys.stderr, flush=True)
            reasons = None
        if reasons is None:
            self._plan()
            return
        if fault.strike is strikes.lose_a_node:
            self._lost_since = time.monotonic()
        self.storm.hit(self, fault, reasons)

    def _see_to(self, struck: Struck, job: str) -> None:
        """Undo what a fault has left behind, until the next attempt starts."""
        self._give_time(struck, job, ("PENDING",))
        last = list(Ledger(self.chain.run.ledger).events(self.stage))[-1].name
        if time.monotonic() - self._moment > EFFECT and last in ("saved", "resumed", "started"):
            self._plan()  # it had none, as an order to die at a call that never came

    def _give_time(self, struck: Struck, job: str, states: Sequence[str]) -> None:
        """Restore the time limit of a job in one of these states."""
        if struck.reasons != {causes.TIME_LIMIT} or not isinstance(self.chain, Chain):
            return
        options = (f"--jobs={job}", "--states=all", "--noheader", "--format=%T")
        if self.chain.cluster.run("squeue", *options, check=False).stdout.strip() in states:
            self.chain.cluster.run("scontrol", "update", f"job={job}", f"TimeLimit={MINUTES}", check=False)

    def _bring_back(self) -> None:
        """Bring lost nodes back a while after the stage has resumed elsewhere."""
        if self._lost_since is None or time.monotonic() - self._lost_since < (60 if self._awaited else 20):
            return
        assert isinstance(self.chain, Chain)
        for name, daemon in self.chain.cluster.daemons().items():
            if name.startswith("node") and not daemon.alive:
                self.chain.cluster.start_node(name)
        self._lost_since = None
