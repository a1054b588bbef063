"""Supervises the processes of a stage on this machine: starts them, stops them together, leaves none.

``python -m hpc_rlhf.launch.local.supervisor RUN STAGE WHAT FIRST COPIES COMMAND…`` leads its own session, so
the terminal's Ctrl-C does not reach the ranks in the middle of a step. Its parent, here or over ssh, writes
to its standard input: ``stop`` lets the ranks save and exit, ``kill`` kills them at once. End of input, when
the parent dies or the connection breaks, means ``stop``.

It replaces submitit's local controller, which gives ranks one second to save, and waits forever when one has died.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, TO_BE_CONTINUED
from hpc_rlhf.run.layout import RunDir

SAVING = 600.0  # seconds that ranks may take to save after a stop request
AFTER_DEATH = 10.0  # seconds that the others may take to exit when a rank has failed
AFTER_END = 60.0  # and when one has succeeded
_REPEAT = 10.0  # a signal can be lost while Python starts, so it is sent again
_POLL = 0.1


@dataclass
class Supervisor:
    """The processes of one attempt at a stage.

    Attributes:
        what: what a message calls one of its processes, such as rank.
        first: number of the first process in messages and log names.
    """

    run: RunDir
    stage: str
    what: str
    first: int
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    should_stop: bool = False
    input_closed: bool = False
    first_bad: int | None = None
    started: float = field(default_factory=time.time)

    def start(self, copies: int, command: list[str]) -> None:
        """Start every rank, with the variables and log names that submitit's tasks expect."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        job_id = str(os.getpid())
        for rank in range(copies):
            env = dict(
                os.environ,
                SUBMITIT_LOCAL_JOB_ID=job_id,
                SUBMITIT_LOCAL_GLOBALID=str(rank),
                SUBMITIT_LOCAL_LOCALID=str(rank),
            )
            logs = self.run.stage(self.stage)
            with logs.log(job_id, rank, "out").open("ab") as out, logs.log(job_id, rank, "err").open("ab") as err:
                process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            self.ranks.append(process)

    def wait(self) -> int:
        """Wait until all ranks have exited, make sure that they do, and return the stage's exit code."""
        stop_at = first_end = signalled = None
        while None in (codes := [rank.poll() for rank in self.ranks]):
            now = time.monotonic()
            if self.should_stop:
                stop_at = stop_at or now
                if signalled is None or now - signalled > _REPEAT:
                    signalled = now
                    os.killpg(0, signal.SIGINT)  # reaches this process too, which only sets `should_stop` again
            if any(code is not None for code in codes):
                first_end = first_end or now
            self._note_first_bad(codes)
            if stop_at and now - stop_at > SAVING:
                self._kill(codes, f"the ranks did not save within {SAVING / 60:.0f} minutes")
            if first_end and now - first_end > (AFTER_END if self.first_bad is None else AFTER_DEATH):
                self._kill(codes, "some ranks kept running after others had exited")
            self._listen()
        self._note_first_bad(codes)
        if self.first_bad is None:
            return TO_BE_CONTINUED if TO_BE_CONTINUED in codes else 0
        if stop_at is None:
            self._explain(codes, "")
        return INPUT_WRONG if INPUT_WRONG in codes else RUN_FAILED

    def _listen(self) -> None:
        """Wait a moment for a command on standard input."""
        if self.input_closed:
            time.sleep(_POLL)
        elif select.select([sys.stdin], [], [], _POLL)[0]:
            command = os.read(sys.stdin.fileno(), 64)
            if b"kill" in command:
                os.killpg(0, signal.SIGKILL)
            self.input_closed = not command
            self.should_stop = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.should_stop = True

    def _note_first_bad(self, codes: list[int | None]) -> None:
        if self.first_bad is None:
            bad = [rank for rank, code in enumerate(codes) if code not in (None, 0, TO_BE_CONTINUED)]
            # A rank that was killed comes before those that lost their connection to it.
            self.first_bad = min(bad, key=lambda rank: ((codes[rank] or 0) > 0, rank), default=None)

    def _kill(self, codes: list[int | None], why: str) -> None:
        self._explain(codes, why)
        os.killpg(0, signal.SIGKILL)  # kills this process too; its parent reads the ledger

    def _explain(self, codes: list[int | None], why: str) -> None:
        """Record a failure that no rank could record itself."""
        from hpc_rlhf.run.events import Failed
        from hpc_rlhf.run.ledger import Ledger

        ledger = Ledger(self.run.ledger)
        code = None if self.first_bad is None else codes[self.first_bad]
        killed = code is not None and code < 0
        failed = ledger.last(Failed, self.stage)
        if failed is not None and failed.time >= self.started and not killed:
            return
        message = why if self.first_bad is None else f"{self.what} {self.first + self.first_bad} {_ending(code)}"
        log = str(self.run.stage(self.stage).log(str(os.getpid()), self.first + (self.first_bad or 0), "err"))
        mistake = INPUT_WRONG if code == INPUT_WRONG else None  # no other attempt helps
        ledger.append(
            Failed(self.stage, attempt=str(os.getpid()), message=message, exit_code=mistake, log=log, killed=killed)
        )


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    memory = "; the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{memory}"


def main(run: str, stage: str, what: str, first: str, copies: str, *command: str) -> int:
    if os.getpgrp() != os.getpid():
        os.setsid()
    supervisor = Supervisor(RunDir(Path(run)), stage, what, int(first))
    supervisor.start(int(copies), list(command))
    return supervisor.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
