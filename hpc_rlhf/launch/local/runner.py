"""Run the stages of a prepared run one after the other without Slurm, and stop them without losing a step."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.launch.chain import is_done
from hpc_rlhf.launch.jobs import find_jobs
from hpc_rlhf.launch.local.environment import environment, visible_gpus
from hpc_rlhf.launch.local.hostfile import Hostfile
from hpc_rlhf.launch.local.interrupts import Interrupted, StopRequests
from hpc_rlhf.launch.local.ranks import Ranks, start_here, start_on
from hpc_rlhf.launch.retry_policy import Stop, decide
from hpc_rlhf.run import notify
from hpc_rlhf.run.attempt_logs import last_seen, last_step
from hpc_rlhf.run.failures import NoLogs, first_cause, judge, returns
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.job import JobSpec

_POLL = 0.2
_LOG_LINES = 12


class Watcher(Protocol):
    """Whoever shows how the run is getting on."""

    def skipped(self, stage: str) -> None: ...
    def started(self, stage: str, ranks: int) -> None: ...
    def tick(self) -> None: ...
    def finished(self, stage: str) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass
class LocalRun:
    """A prepared run directory, run here or on a hostfile's machines.

    Attributes:
        again: the command that goes on after a stop.
    """

    spec: JobSpec
    run: RunDir
    hostfile: Hostfile | None
    watcher: Watcher
    again: str

    def run_stages(self, stages: Sequence[str] | None = None) -> None:
        """Run every stage whose artifact is not complete, in an order in which each follows its needs.

        Args:
            stages: those to run; all when left out.

        Raises:
            HpcRlhfError: a stage failed; the later ones were not started.
            Interrupted: the run was asked to stop; everything is saved.
        """
        stages = self.spec.stage_names if stages is None else stages
        for stage in stages:
            self._check_hostfile(stage)
        with StopRequests().listening() as stop:
            for stage in stages:
                if stop.count:
                    raise self._interrupted(f"stopped before {stage}", stop)
                if is_done(self.run, stage):
                    self.watcher.skipped(stage)
                    continue
                self._run_stage(stage, stop)

    def _run_stage(self, stage: str, stop: StopRequests) -> None:
        sent_off = len(self._events(stage))
        while True:
            before = len(self._events(stage))
            self.watcher.started(stage, self.spec.stage(stage).slurm.ranks)
            ranks = self._start(stage)
            self._watch(ranks, stage, stop)
            if is_done(self.run, stage):
                break
            error = self._ending(stage, ranks, self._events(stage)[before:], stop)
            if isinstance(error, Interrupted):
                raise error
            if not self._to_be_tried_again(stage, sent_off, stop):
                spent = returns(self._events(stage)[sent_off:]) >= self.spec.stage(stage).slurm.max_requeues
                notify.send(self.run, "budget spent" if spent else "stopped", stage, error.message)
                raise error
        self.watcher.finished(stage)
        if stop.count:
            raise self._interrupted(f"stopped after {stage}, which is finished", stop)

    def _to_be_tried_again(self, stage: str, sent_off: int, stop: StopRequests) -> bool:
        """Write down how an attempt ended, and wait until it is time for the next, if there is to be one.

        Args:
            sent_off: how many events the stage had when a person sent it off.
        """
        settings, ledger = self.spec.stage(stage).slurm, Ledger(self.run.ledger)
        ending = judge(self._events(stage)[sent_off:], None, NoLogs(), last_step(self.run.stage(stage)))
        ledger.append("ended", stage, **asdict(ending), seen=last_seen(self.run.stage(stage)))
        verdict = decide(self._events(stage)[sent_off:], settings.max_requeues, settings.heal.backoff_seconds)
        if isinstance(verdict, Stop) or not settings.heal.enabled:
            return False
        self.watcher.say(f"{stage}: {ending.reason}: {ending.message}; tried again in {verdict.delay} s")
        due = time.monotonic() + verdict.delay
        while time.monotonic() < due and not stop.count:
            time.sleep(_POLL)
        if stop.count:
            raise self._interrupted(f"stopped before another attempt at {stage}", stop)
        ledger.append("retried", stage, delay=verdict.delay)
        return True

    def _start(self, stage: str) -> Ranks:
        slurm = self.spec.stage(stage).slurm
        if self.hostfile is not None:
            address = os.environ.get("MASTER_ADDR") or self.hostfile.master_address()
            env = environment(os.environ, max(self.hostfile.slots.values()), address)
            return start_on(self.hostfile, self.run, stage, env)
        env = environment(os.environ, slurm.ranks)
        gpus, gpus_wanted = visible_gpus(env), slurm.gpus_per_node > 0
        if gpus_wanted and gpus == 0:
            self.watcher.say(f"{stage}: no NVIDIA GPU is seen here; without one it runs on the CPU")
        elif gpus_wanted and gpus < slurm.ranks:
            self.watcher.say(f"{stage}: {slurm.ranks} ranks but GPUs here: {gpus}; so it runs on the CPU")
        if 0 < gpus < slurm.ranks or not gpus_wanted:
            env["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a GPU
        return start_here(self.run, stage, slurm.ranks, env)

    def _watch(self, ranks: Ranks, stage: str, stop: StopRequests) -> None:
        """Wait for the ranks to end. The first request lets them save, the second ends them at once.

        Should this fail, the end of this process closes the supervisors' input, and they let the ranks save.
        """
        told = 0
        while not ranks.ended():
            self.watcher.tick()
            if stop.count > told:
                told += 1  # one at a time: the second may come while the first is being answered
                if told == 1:
                    self.watcher.say(f"{stage}: saving; press Ctrl-C again to stop at once")
                    ranks.stop()
                else:
                    ranks.kill()
            time.sleep(_POLL)
        ranks.sweep()  # what a rank that died may have left, such as its data workers
        self.watcher.tick()

    def _ending(
        self, stage: str, ranks: Ranks, events: list[dict[str, Any]], stop: StopRequests
    ) -> HpcRlhfError:
        """Why a stage ended without its model: it was asked to, or it failed."""
        failed = first_cause(events)
        # The ranks of a launcher that was killed may have their last word after ours have begun.
        own = {event.get("attempt") for event in events if event["event"] == "started"}
        words = (event for event in events if event["event"] == "interrupted" and event.get("attempt") in own)
        saved = next(words, None)
        if saved:
            return self._interrupted(f"{stage} is saved at step {saved['step']}", stop)
        if stop.count:
            last = Ledger(self.run.ledger).last("saved", stage)
            kept = f"its last checkpoint is of step {last['step']}" if last else "it had no checkpoint yet"
            why = f" ({failed['message']})" if failed else ""
            return self._interrupted(f"{stage} was stopped without saving{why}; {kept}", stop)
        if failed is None:
            codes = ", ".join(f"{code} on {host}" for host, code in ranks.codes().items())
            failed = {"message": f"ended without a model (exit code {codes}; 255 is ssh's own)"}
        logs = self.run.stage(stage).logs
        if "log" not in failed:
            return HpcRlhfError(
                failed["message"], stage, f"the logs are in {logs}", failed.get("exit_code", RUN_FAILED)
            )
        # No rank could say why itself.
        message = failed["message"] + _tail(Path(failed["log"]))
        return HpcRlhfError(message, stage, f"the whole log is {failed['log']}", RUN_FAILED)

    def _interrupted(self, what: str, stop: StopRequests) -> Interrupted:
        return Interrupted(
            what, hint=f"go on with: {self.again}", exit_code=128 + (stop.number or signal.SIGINT)
        )

    def _events(self, stage: str) -> list[dict[str, Any]]:
        """A stage's events. An attempt's own are told by counting, since machines' clocks differ."""
        return list(Ledger(self.run.ledger).events(stage))

    def _check_hostfile(self, stage: str) -> None:
        slurm = self.spec.stage(stage).slurm
        if self.hostfile is not None and self.hostfile.ranks != slurm.ranks:
            raise HpcRlhfError(
                f"the hostfile has {self.hostfile.ranks} slots, but {stage} runs on {slurm.ranks} ranks "
                f"({slurm.nodes} nodes x {slurm.tasks_per_node})",
                where=str(self.hostfile.path),
                hint=f"change the slots, or slurm.nodes and slurm.{'ranks' if slurm.ranks_per_node else 'gpus'}_per_node",
            )


def refuse_live_jobs(run: RunDir) -> None:
    """Two launchers must not train one run.

    Raises:
        HpcRlhfError: Slurm jobs of this run are queued or running.
    """
    live = find_jobs(run).live
    if live:
        names = ", ".join(f"{stage} (job {job.job_id}, {job.state})" for stage, job in live.items())
        raise HpcRlhfError(
            f"this run has Slurm jobs: {names}",
            where=str(run.path),
            hint=f"let them run, or cancel them first: hpc-rlhf cancel {shlex.quote(str(run.path))}",
        )


def _tail(log: Path) -> str:
    """The last lines of a log that say something, indented."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return "".join(f"\n  {line[:200]}" for line in lines[-_LOG_LINES:])
