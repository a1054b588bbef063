"""Machines without Slurm: a hostfile read and checked, and the commands that start a stage on them."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError

_LINE = re.compile(
    r"([A-Za-z0-9_][\w.@-]*)\s+slots=(\d+)\s*(#.*)?"
)  # what DeepSpeed's own parser takes, and no more


_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30")
# What a rank on another machine needs of this environment. Not all of it: it is seen in ssh's arguments.
_SENT = ("NCCL_", "GLOO_", "UCX_", "PYTHON", "DS_", "OMP_")


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

    def first_rank(self, host: str) -> int:
        """The first of the ranks on a machine."""
        return sum(list(self.slots.values())[: list(self.slots).index(host)])

    def master_address(self) -> str:
        """An address of the first machine that the others can reach.

        Raises:
            HpcRlhfError: it does not say.
        """
        first = next(iter(self.slots))
        if len(self.slots) == 1 and is_here(first):
            return "127.0.0.1"
        ask = ["hostname", "-I"]
        answer = subprocess.run(
            ask if is_here(first) else [*_SSH, first, *ask], capture_output=True, text=True
        )
        if answer.returncode or not answer.stdout.split():
            raise HpcRlhfError(
                f"cannot find the address of {first}: {answer.stderr.strip() or 'no answer'}",
                where=str(self.path),
                hint="it must be reached by ssh without a password; or set MASTER_ADDR to its address",
                exit_code=RUN_FAILED,
            )
        return answer.stdout.split()[0]

    def deepspeed(
        self, host: str, task: list[str], env: Mapping[str, str], gpus: list[str] | None = None
    ) -> list[str]:
        """DeepSpeed's launcher of one machine's ranks, which its own runner would start through pdsh.

        The runner is left out because it stops by killing every DeepSpeed job that the user has on these
        machines.

        Args:
            task: the module that a rank runs, and its arguments.
            env: says where the ranks meet.
            gpus: of this machine, as CUDA_VISIBLE_DEVICES names them; its first ones when left out.
        """
        world: dict[str, list[str] | list[int]] = {name: list(range(n)) for name, n in self.slots.items()}
        if gpus is not None and len(gpus) == self.slots[host]:
            world[host] = gpus
        options = [
            "--log_level=warning",
            f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
            f"--node_rank={list(self.slots).index(host)}",
            f"--master_addr={env['MASTER_ADDR']}",
            f"--master_port={env['MASTER_PORT']}",
        ]
        return [sys.executable, "-m", "deepspeed.launcher.launch", *options, "--module", *task]

    def torchrun(self, host: str, task: list[str], env: Mapping[str, str]) -> list[str]:
        """torchrun's launcher of one machine's ranks; the arguments are those of ``deepspeed``."""
        options = [
            f"--nnodes={len(self.slots)}",
            f"--nproc-per-node={self.slots[host]}",
            f"--node-rank={list(self.slots).index(host)}",
            f"--master-addr={env['MASTER_ADDR']}",
            f"--master-port={env['MASTER_PORT']}",
        ]
        return [sys.executable, "-m", "torch.distributed.run", *options, "--module", *task]


def is_here(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def on_host(host: str, command: list[str], env: Mapping[str, str]) -> list[str]:
    """A command as it is started on one of the machines, in this folder and with what it needs of ``env``."""
    if is_here(host):
        return command
    sent = [f"{name}={value}" for name, value in env.items() if name.startswith(_SENT)]
    return [*_SSH, host, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *sent, *command])}"]


def read_hostfile(path: Path) -> Hostfile:
    """Read a hostfile: lines of ``machine slots=N``, with comments and empty lines between.

    Raises:
        HpcRlhfError: it cannot be read, has a bad line, or no machine.
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
    return Hostfile(path.absolute(), slots)
