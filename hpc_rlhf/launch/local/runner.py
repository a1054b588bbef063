"""Run the stages of a prepared run one after another without Slurm, and stop them without losing a step."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.launch.jobs import find_jobs
from hpc_rlhf.launch.local.environment import environment, visible_gpus
from hpc_rlhf.launch.local.hostfile import Hostfile
from hpc_rlhf.launch.local.ranks import Ranks, start_here, start_on
from hpc_rlhf.run import events, manifest, notify
from hpc_rlhf.run.attempt_logs import AttemptLogs, last_seen, last_step
from hpc_rlhf.run.events import Failed, Retried, Saved, Started
from hpc_rlhf.run.failures import judge
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.retry_policy import Retry, Stop, StopKind, decide
from hpc_rlhf.spec import rollout_checks
from hpc_rlhf.spec.job import JobSpec

_POLL = 0.2
_LOG_LINES = 12


class Interrupted(HpcRlhfError):
    """The user or the machine asked the run to stop."""


@dataclass
class StopRequests:
    """Counts the signals that ask this process to stop; the handler does nothing else."""

    count: int = 0
    number: int = 0

    @contextmanager
    def listening(self) -> Iterator[StopRequests]:
        # Ignored signals stay ignored: nohup's SIGHUP, and a background job's SIGINT.
        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        numbers = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._count) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.number = number


class Watcher(Protocol):
    """Shows the progress of the run."""

    def skipped(self, stage: str) -> None: ...
    def started(self, stage: str, ranks: int) -> None: ...
    def tick(self) -> None: ...
    def finished(self, stage: str) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass
class LocalRun:
    """A prepared run directory, run on this machine or on a hostfile's machines.

    Attributes:
        again: the command that resumes after a stop.
    """

    spec: JobSpec
    run: RunDir
    hostfile: Hostfile | None
    watcher: Watcher
    again: str

    def run_stages(self, stages: Sequence[str] | None = None) -> None:
        """Run every stage, or those named, whose artifact is not complete; each follows its needs.

        Raises:
            HpcRlhfError: a stage failed; later ones were not started.
            Interrupted: the run was asked to stop; everything is saved.
        """
        stages = self.spec.stage_names if stages is None else stages
        if self.hostfile is not None:
            for stage in stages:
                self.hostfile.check_ranks(stage, self.spec.stage(stage).slurm)
        with StopRequests().listening() as stop:
            for stage in stages:
                if stop.count:
                    raise self._interrupted(f"stopped before {stage}", stop)
                if manifest.is_done(self.run.stage(stage)):
                    self.watcher.skipped(stage)
                    continue
                self._run_stage(stage, stop)

    def _run_stage(self, stage: str, stop: StopRequests) -> None:
        begin = self._event_count(stage)
        while True:
            before = self._event_count(stage)
            self.watcher.started(stage, self.spec.stage(stage).slurm.ranks)
            ranks = self._start(stage)
            self._watch(ranks, stage, stop)
            if manifest.is_done(self.run.stage(stage)):
                break
            error = self._ending(stage, ranks, self._history(stage, before), stop)
            if isinstance(error, Interrupted):
                raise error
            verdict = self._verdict(stage, begin)
            if isinstance(verdict, Stop):
                notify.send_stop(self.run, stage, verdict.kind, error.message)
                raise error
            self._wait_for_retry(stage, verdict, stop)
        self.watcher.finished(stage)
        if stop.count:
            raise self._interrupted(f"stopped after {stage}, which is finished", stop)

    def _verdict(self, stage: str, begin: int) -> Retry | Stop:
        """Record how an attempt ended, and decide whether there is another. The stage had ``begin`` events when
        the user started it."""
        files, settings = self.run.stage(stage), self.spec.stage(stage).slurm
        ended = judge(self._history(stage, begin), None, AttemptLogs(files, None), last_step(files))
        Ledger(self.run.ledger).append(replace(ended, stage=stage, seen=last_seen(files)))
        verdict = decide(self._history(stage, begin), settings.max_requeues, settings.heal.backoff_seconds)
        if isinstance(verdict, Retry) and not settings.heal.enabled:
            return Stop(StopKind.HEALING_DISABLED, ended.message)
        if isinstance(verdict, Retry):
            self.watcher.say(f"{stage}: {ended.reason}: {ended.message}; retrying in {verdict.delay} s")
        return verdict

    def _wait_for_retry(self, stage: str, verdict: Retry, stop: StopRequests) -> None:
        due = time.monotonic() + verdict.delay
        while time.monotonic() < due and not stop.count:
            time.sleep(_POLL)
        if stop.count:
            raise self._interrupted(f"stopped before another attempt at {stage}", stop)
        Ledger(self.run.ledger).append(Retried(stage, delay=verdict.delay))

    def _start(self, stage: str) -> Ranks:
        settings = self.spec.stage(stage)
        slurm, rollout = settings.slurm, rollout_checks.vllm_of(settings)
        if self.hostfile is not None:
            address = os.environ.get("MASTER_ADDR") or self.hostfile.master_address()
            env = environment(os.environ, max(self.hostfile.slots.values()), address)
            return start_on(self.hostfile, self.run, stage, env)
        env = environment(os.environ, slurm.ranks)
        gpus, gpus_wanted = visible_gpus(env), slurm.gpus_per_node > 0
        needed = slurm.ranks
        if rollout is not None and rollout.placement != "colocated":
            nodes = rollout.own_nodes or slurm.nodes
            needed += nodes * rollout.servers(slurm) * rollout.tensor_parallel
        if gpus_wanted and gpus < needed:
            of_vllm = " and servers of vLLM" if needed > slurm.ranks else ""
            few = f"{needed} ranks{of_vllm}, but {gpus} visible GPU{'s' * (gpus > 1)}"
            why = few if gpus else "this machine has no visible NVIDIA GPU"
            self.watcher.say(f"{stage}: {why}; running on the CPU")
        if 0 < gpus < needed or not gpus_wanted:
            env["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a GPU
        return start_here(self.run, stage, slurm.ranks, env)

    def _watch(self, ranks: Ranks, stage: str, stop: StopRequests) -> None:
        """Wait until the ranks exit. The first stop request lets them save, the second kills them.

        If this process dies, the supervisors' input closes, and they let the ranks save.
        """
        handled = 0
        while not ranks.ended():
            self.watcher.tick()
            if stop.count > handled:
                handled += 1  # one at a time: the second may arrive while the first is handled
                if handled == 1:
                    self.watcher.say(f"{stage}: saving; press Ctrl-C again to stop at once")
                    ranks.stop()
                else:
                    ranks.kill()
            time.sleep(_POLL)
        ranks.sweep()  # what a dead rank may have left behind, such as data workers
        self.watcher.tick()

    def _ending(self, stage: str, ranks: Ranks, attempt: StageHistory, stop: StopRequests) -> HpcRlhfError:
        """Why a stage ended without its model: it was stopped, or it failed."""
        failed = attempt.first_cause
        # Ranks of a launcher that was killed may write their last event after ours have started.
        own = {event.attempt for event in attempt.all(Started)}
        saved = next((event for event in attempt.all(events.Interrupted) if event.attempt in own), None)
        if saved:
            return self._interrupted(f"{stage} is saved at step {saved.step}", stop)
        if stop.count:
            last = Ledger(self.run.ledger).last(Saved, stage)
            kept = f"its last checkpoint is at step {last.step}" if last else "it had no checkpoint yet"
            why = f" ({failed.message})" if failed else ""
            return self._interrupted(f"{stage} was stopped without saving{why}; {kept}", stop)
        if failed is None:
            codes = ", ".join(f"{code} on {host}" for host, code in ranks.codes().items())
            failed = Failed(message=f"ended without a model (exit code {codes}; 255 is from ssh)")
        code = RUN_FAILED if failed.exit_code is None else failed.exit_code
        if not failed.log:
            return HpcRlhfError(failed.message, stage, f"the logs are in {self.run.stage(stage).logs}", code)
        # No rank could report the reason itself.
        message = failed.message + _tail(Path(failed.log))
        return HpcRlhfError(message, stage, f"the whole log is {failed.log}", code)

    def _interrupted(self, what: str, stop: StopRequests) -> Interrupted:
        return Interrupted(what, hint=f"resume with: {self.again}", exit_code=128 + (stop.number or signal.SIGINT))

    def _history(self, stage: str, begin: int) -> StageHistory:
        """A stage's events after the first ones, which are counted because machines' clocks differ."""
        return StageHistory.read(self.run, stage).after(begin)

    def _event_count(self, stage: str) -> int:
        return len(StageHistory.read(self.run, stage).events)


def refuse_live_jobs(run: RunDir) -> None:
    """Raise HpcRlhfError if Slurm jobs of this run are queued or running."""
    live = find_jobs(run).live
    if live:
        names = ", ".join(f"{stage} (job {job.job_id}, {job.state})" for stage, job in live.items())
        raise HpcRlhfError(
            f"this run has Slurm jobs: {names}",
            where=str(run.path),
            hint=f"let them run, or cancel them first: hpc-rlhf cancel {shlex.quote(str(run.path))}",
        )


def _tail(log: Path) -> str:
    """The last nonempty lines of a log, indented."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return "".join(f"\n  {line[:200]}" for line in lines[-_LOG_LINES:])
