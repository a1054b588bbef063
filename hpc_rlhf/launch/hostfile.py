"""Machines without Slurm: a hostfile read and checked, and the DeepSpeed command that starts a stage on them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError

_LINE = re.compile(
    r"([A-Za-z0-9_][\w.@-]*)\s+slots=(\d+)\s*(#.*)?"
)  # what DeepSpeed's own parser takes, and no more


@dataclass(frozen=True)
class Hostfile:
    """A checked hostfile.

    Attributes:
        path: where it is.
        slots: ranks on each machine, in the file's order; rank 0 is on the first.
    """

    path: Path
    slots: dict[str, int]

    @property
    def ranks(self) -> int:
        return sum(self.slots.values())

    @property
    def is_here(self) -> bool:
        """Whether it names this machine only, so that no ssh is needed."""
        here = {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}
        return len(self.slots) == 1 and self.slots.keys() <= here

    def command(self, run_dir: Path, stage: str, port: int) -> list[str]:
        """The command that runs a stage with one rank on every slot."""
        task = ["--module", "hpc_rlhf.task", str(run_dir), stage]
        if not self.is_here:
            # --force_multi: without it a single other machine is taken for this one.
            runner = ["--hostfile", str(self.path), "--master_port", str(port), "--force_multi"]
            return [sys.executable, "-m", "deepspeed.launcher.runner", *runner, *task]
        # What the runner would start. It is not started itself, because it ends at once when it is told to
        # stop and leaves this process to itself.
        world = {host: list(range(slots)) for host, slots in self.slots.items()}
        info = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
        node = [f"--world_info={info}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        return [sys.executable, "-m", "deepspeed.launcher.launch", *node, *task]


def read_hostfile(path: Path) -> Hostfile:
    """Read a hostfile: lines of ``machine slots=N``, with comments and empty lines between.

    Raises:
        HpcRlhfError: it cannot be read, has a bad line or no machine, or names machines that cannot be reached
            from here.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise HpcRlhfError(f"cannot read the hostfile: {reason}", where=str(path)) from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or int(match[2]) < 1:
            raise HpcRlhfError(
                f"cannot read {line!r}",
                where=f"{path}:{number}",
                hint="a line is a machine and its number of GPUs, such as: node1 slots=8",
            )
        if match[1] in slots:
            raise HpcRlhfError(f"{match[1]} is named twice", where=f"{path}:{number}")
        slots[match[1]] = int(match[2])
    if not slots:
        raise HpcRlhfError("the hostfile names no machine", where=str(path), hint="add: localhost slots=1")
    hostfile = Hostfile(path.absolute(), slots)
    if not hostfile.is_here and shutil.which("pdsh") is None:
        raise HpcRlhfError(
            "DeepSpeed reaches other machines through pdsh, which is not installed here",
            where=str(path),
            hint="install pdsh, and set up ssh to these machines without a password",
        )
    return hostfile
