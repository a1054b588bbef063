"""Run the stages of a prepared run one after the other without Slurm, and stop them without losing a step."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from submitit.local.local import LocalExecutor, LocalJob

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.launch.hostfile import Hostfile
from hpc_rlhf.launch.jobs import find_live
from hpc_rlhf.launch.local_env import environment, visible_gpus
from hpc_rlhf.launch.lock import Lock
from hpc_rlhf.launch.stopping import Interrupted, StopRequests
from hpc_rlhf.launch.submit import is_done
from hpc_rlhf.ledger import Ledger
from hpc_rlhf.rundir import RunDir
from hpc_rlhf.spec.model import JobSpec
from hpc_rlhf.task import StageTask

_POLL = 0.2
_FAR_MACHINES = 45.0  # DeepSpeed's launcher gives ranks on other machines 30 s to save
_LOG_LINES = 12


class Watcher(Protocol):
    """Whoever shows how the run is getting on."""

    def skipped(self, stage: str) -> None: ...
    def started(self, stage: str, ranks: int) -> None: ...
    def tick(self) -> None: ...
    def finished(self, stage: str) -> None: ...
    def say(self, text: str) -> None: ...


class SupervisedExecutor(LocalExecutor):
    """Submitit's local executor, with our supervisor in place of its controller."""

    def __init__(self, run: RunDir, stage: str, ranks: int, env: dict[str, str]) -> None:
        super().__init__(run.stage(stage).logs)
        self._start = (run, stage, ranks, env)
        self.process: subprocess.Popen[bytes] | None = None

    def _submit_command(self, command: str) -> LocalJob[Any]:
        run, stage, ranks, env = self._start
        env = {
            **env,
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(ranks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
        }
        self.process = _supervise(run, stage, "rank", ranks, shlex.split(command), env)
        return LocalJob(self.folder, str(self.process.pid), list(range(ranks)), self.process)


@dataclass
class LocalRun:
    """A prepared run directory, run here or on a hostfile's machines.

    Attributes:
        again: the command that goes on after a stop.
    """

    spec: JobSpec
    run: RunDir
    hostfile: Hostfile | None
    lock: Lock
    watcher: Watcher
    again: str

    def run_stages(self) -> None:
        """Run every stage whose model is not complete, in an order in which each follows its needs.

        Raises:
            HpcRlhfError: a stage failed; the later ones were not started.
            Interrupted: the run was asked to stop; everything is saved.
        """
        for stage in self.spec.stage_names:
            self._check_hostfile(stage)
        with StopRequests().listening() as stop:
            for stage in self.spec.stage_names:
                if stop.count:
                    raise self._interrupted(f"stopped before {stage}", stop)
                if is_done(self.run, stage):
                    self.watcher.skipped(stage)
                    continue
                self._run_stage(stage, stop)

    def _run_stage(self, stage: str, stop: StopRequests) -> None:
        ranks = self.spec.stage(stage).slurm.ranks
        since = len(self._events(stage))
        self.watcher.started(stage, ranks)
        process = self._start(stage, ranks)
        try:
            self._watch(process, stage, stop)
        except BaseException:
            process.terminate()  # the supervisor lets the ranks save
            raise
        if stop.count == 1 and self.hostfile is not None and not self.hostfile.is_here:
            self._await_far_machines(stage, since)
        if not is_done(self.run, stage):
            raise self._ending(stage, process, since, stop)
        self.watcher.finished(stage)
        if stop.count:
            raise self._interrupted(f"stopped after {stage}, which is finished", stop)

    def _start(self, stage: str, ranks: int) -> subprocess.Popen[bytes]:
        if self.hostfile is not None:
            env = environment(os.environ, next(iter(self.hostfile.slots.values())))
            command = self.hostfile.command(self.run.path, stage, int(env["MASTER_PORT"]))
            return _supervise(self.run, stage, "launcher", 1, command, env)
        env = environment(os.environ, ranks)
        gpus, gpus_wanted = visible_gpus(env), self.spec.stage(stage).slurm.gpus_per_node > 0
        if 0 < gpus < ranks or not gpus_wanted:
            env["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a GPU
            if gpus_wanted:
                self.watcher.say(f"{stage}: {ranks} ranks but {gpus} GPUs here, so it runs on the CPU")
        executor = SupervisedExecutor(self.run, stage, ranks, env)
        executor.submit(StageTask(str(self.run.path), stage))
        assert executor.process is not None
        return executor.process

    def _watch(self, process: subprocess.Popen[bytes], stage: str, stop: StopRequests) -> None:
        """Wait for the ranks to end. The first request lets them save, the second ends them at once."""
        told = 0
        while process.poll() is None:
            self.watcher.tick()
            self.lock.touch()
            if stop.count > told:
                if told == 0:
                    self.watcher.say(f"{stage}: saving; press Ctrl-C again to stop at once")
                    process.send_signal(signal.SIGINT)
                else:
                    _kill_group(process)
                told = stop.count
            time.sleep(_POLL)
        _kill_group(process)  # what a rank that died may have left, such as its data workers
        self.watcher.tick()

    def _await_far_machines(self, stage: str, since: int) -> None:
        deadline = time.monotonic() + _FAR_MACHINES
        while time.monotonic() < deadline:
            if any(event["event"] in ("interrupted", "failed") for event in self._events(stage)[since:]):
                return
            time.sleep(_POLL)

    def _ending(
        self, stage: str, process: subprocess.Popen[bytes], since: int, stop: StopRequests
    ) -> HpcRlhfError:
        """Why a stage ended without its model: it was asked to, or it failed."""
        events = self._events(stage)[since:]
        # The first failure is the cause; those of the other ranks, that they lost touch with it, follow from it.
        failed = next((event for event in events if event["event"] == "failed"), {})
        saved = next((event for event in events if event["event"] == "interrupted"), None)
        if saved:
            return self._interrupted(f"{stage} is saved at step {saved['step']}", stop)
        if stop.count:
            last = Ledger(self.run.ledger).last("saved", stage)
            kept = f"its last checkpoint is of step {last['step']}" if last else "it had no checkpoint yet"
            why = f" ({failed['message']})" if failed else ""
            return self._interrupted(f"{stage} was stopped without saving{why}; {kept}", stop)
        log = self.run.stage(stage).log(str(process.pid), failed.get("rank") or 0, "err")
        message = failed.get("message", f"ended without a model (exit code {process.returncode})")
        if "rank" in failed or not failed:  # no rank could say why itself
            message += _tail(log)
        code = failed.get("exit_code", RUN_FAILED)
        return HpcRlhfError(message, where=stage, hint=f"the whole log is {log}", exit_code=code)

    def _interrupted(self, what: str, stop: StopRequests) -> Interrupted:
        return Interrupted(
            what, hint=f"go on with: {self.again}", exit_code=128 + (stop.number or signal.SIGINT)
        )

    def _events(self, stage: str) -> list[dict[str, Any]]:
        """A stage's events. An attempt's own are told by counting, since other machines' clocks differ."""
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
    live = find_live(run)
    if live:
        names = ", ".join(f"{stage} (job {job.job_id}, {job.state})" for stage, job in live.items())
        raise HpcRlhfError(
            f"this run has Slurm jobs: {names}",
            where=str(run.path),
            hint=f"let them run, or cancel them first: hpc-rlhf cancel {shlex.quote(str(run.path))}",
        )


def _supervise(
    run: RunDir, stage: str, what: str, copies: int, command: list[str], env: dict[str, str]
) -> subprocess.Popen[bytes]:
    start = [sys.executable, "-m", "hpc_rlhf.launch.supervisor", str(run.path), stage, what, str(copies)]
    return subprocess.Popen([*start, *command], env=env, stdin=subprocess.DEVNULL, start_new_session=True)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the supervisor, if it has not, and everything it started; it leads a process group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    """The last lines of a log that say something, indented."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return "".join(f"\n  {line[:200]}" for line in lines[-_LOG_LINES:])
