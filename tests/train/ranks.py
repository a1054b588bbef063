"""Starts ranks of a process group on this machine.

In tests without a GPU, a rank is a fork of a process that has loaded torch, DeepSpeed and transformers already, which
takes longer than most of what these ranks do. A process that may have touched CUDA cannot be forked.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hpc_rlhf.launch.local.environment import free_port

MANY_DEADLINE = 600.0  # for ranks that run many stages
FORKS = "pytest" in sys.modules and not Path("/dev/nvidia0").exists()
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.train.preloaded"])


class ForkedRank:
    """A rank, with the part of ``subprocess.Popen`` that the tests need."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process
        process.start()
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"the rank with process id {self.pid} did not end in {timeout:g} s")
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Rank = ForkedRank | subprocess.Popen[bytes]


def rank_environment(ranks: int, port: int) -> list[dict[str, str]]:
    """The environment of each of the ranks of a process group on this machine."""
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def start(
    python: Sequence[str], outputs: Sequence[Path], errors: Sequence[Path] | None = None, **env: str
) -> list[Rank]:
    """Start the ranks of a group, whose outputs are appended to files.

    Args:
        python: arguments of the interpreter: ``-m MODULE`` or ``-c SCRIPT``, and those of the program.
        outputs: a file for each rank.
        errors: files for what the ranks print to stderr; by default the outputs.
    """
    streams = zip(rank_environment(len(outputs), free_port()), outputs, errors or outputs, strict=True)
    return [_start(python, {**environment, **env}, output, error) for environment, output, error in streams]


def _start(python: Sequence[str], environment: dict[str, str], output: Path, error: Path) -> Rank:
    if FORKS:
        return ForkedRank(_server.Process(target=_run, args=(python, environment, output, error)))
    with output.open("ab") as out, error.open("ab") as err:
        return subprocess.Popen([sys.executable, *python], env=environment, stdout=out, stderr=err)


def _run(python: Sequence[str], environment: dict[str, str], output: Path, error: Path) -> None:
    """Become a rank, as a new interpreter with these arguments would."""
    for path, stream in ((output, 1), (error, 2)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    option, program, *arguments = python
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(program, run_name="__main__")
    else:
        exec(compile(program, "<rank>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)  # while Python shuts down, a thread of gloo may abort the process


def wait(ranks: Sequence[Rank], logs: Sequence[Path], timeout: float = MANY_DEADLINE) -> None:
    """Wait until all ranks have ended.

    Raises:
        AssertionError: a rank failed; it contains the ends of the logs.
        TimeoutError, subprocess.TimeoutExpired: a rank did not end; all are killed.
    """
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)


def reports(script: str, arguments: Sequence[str], ranks: int) -> list[Any]:
    """Run a script on ranks. Returns for each rank the JSON object that it printed last.

    Raises:
        AssertionError: a rank failed; it contains the ends of their logs.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"{rank}.out") for rank in range(ranks)]
        logs = [Path(folder, f"{rank}.err") for rank in range(ranks)]
        wait(start(["-c", script, *arguments], outputs, logs), logs)
        lines = [output.read_text().splitlines() for output in outputs]
    return [json.loads(next(line for line in reversed(each) if line.startswith("{"))) for each in lines]
