"""Starts, stops and kills the ranks of one attempt at a stage, through their supervisors."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from submitit.local.local import LocalExecutor, LocalJob

from hpc_rlhf import safe_path
from hpc_rlhf.launch.local.hostfile import Hostfile, on_host
from hpc_rlhf.launch.local.supervisor import AFTER_END
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.task import StageTask

_KILL_SECONDS = 2.0  # that a supervisor gets to kill its ranks, before its process group is killed from here


@dataclass
class Ranks:
    """The supervisors of one attempt.

    Attributes:
        supervisors: by machine; on another machine, the ssh that started it there.
    """

    supervisors: dict[str, subprocess.Popen[bytes]]
    _first_end: float = 0.0

    def ended(self) -> bool:
        """Whether all have ended. Once one machine's ranks have, the others' are killed after a while."""
        codes = self.codes().values()
        if None not in codes:
            return True
        if any(code is not None for code in codes):
            self._first_end = self._first_end or time.monotonic()
            if time.monotonic() - self._first_end > AFTER_END:
                self.kill()
        return False

    def codes(self) -> dict[str, int | None]:
        return {host: process.poll() for host, process in self.supervisors.items()}

    def stop(self) -> None:
        """Ask the ranks to save and exit."""
        self._send(b"stop\n")

    def kill(self) -> None:
        """Kill the ranks at once."""
        self._send(b"kill\n")
        deadline = time.monotonic() + _KILL_SECONDS
        while None in self.codes().values() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.sweep()

    def sweep(self) -> None:
        """Kill what is left on this machine. Each supervisor leads the process group of its ranks."""
        for process in self.supervisors.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _send(self, command: bytes) -> None:
        for process in self.supervisors.values():
            assert process.stdin is not None
            with suppress(OSError):  # it has just exited
                process.stdin.write(command)
                process.stdin.flush()


def start_here(run: RunDir, stage: str, ranks: int, env: Mapping[str, str]) -> Ranks:
    """Start all ranks on this machine with submitit."""
    executor = SupervisedExecutor(run, stage, ranks, env)
    executor.submit(StageTask(str(run.path), stage))
    assert executor.supervisor is not None
    return Ranks({"this machine": executor.supervisor})


def start_on(hostfile: Hostfile, run: RunDir, stage: str, env: Mapping[str, str]) -> Ranks:
    """Start DeepSpeed's launcher on every machine of a hostfile."""
    supervisors, first_rank = {}, 0
    for host, slots in hostfile.slots.items():
        launcher = hostfile.deepspeed(host, safe_path.module("hpc_rlhf.task", str(run.path), stage), env)
        command = _supervised(run, stage, "the launcher of rank", first_rank, 1, launcher)
        supervisors[host] = _start(run, on_host(host, run.path, command, env), env)
        first_rank += slots
    return Ranks(supervisors)


class SupervisedExecutor(LocalExecutor):
    """submitit's local executor, with our supervisor instead of its controller."""

    def __init__(self, run: RunDir, stage: str, ranks: int, env: Mapping[str, str]) -> None:
        super().__init__(run.stage(stage).logs)
        self._start = (run, stage, ranks, env)
        self.supervisor: subprocess.Popen[bytes] | None = None

    @property
    def _submitit_command_str(self) -> str:
        """Our entry point instead of submitit's."""
        return shlex.join(safe_path.module("hpc_rlhf.rank", str(self.folder)))

    def _submit_command(self, command: str) -> LocalJob[Any]:
        run, stage, ranks, env = self._start
        env = {
            **env,
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(ranks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
        }
        self.supervisor = _start(run, _supervised(run, stage, "rank", 0, ranks, shlex.split(command)), env)
        return LocalJob(self.folder, str(self.supervisor.pid), list(range(ranks)), self.supervisor)


def _supervised(run: RunDir, stage: str, what: str, first: int, copies: int, command: list[str]) -> list[str]:
    words = (str(run.path), stage, what, str(first), str(copies), *command)
    return safe_path.module("hpc_rlhf.launch.local.supervisor", *words)


def _start(run: RunDir, command: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=env, cwd=run.path, stdin=subprocess.PIPE, start_new_session=True)
