"""Machines without Slurm: reads a hostfile, and builds the commands that start a stage on its machines."""

from __future__ import annotations

import base64
import json
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rlhf import safe_path
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError

if TYPE_CHECKING:  # a node's launcher imports this module before it can handle signals
    from hpc_rlhf.spec.cluster import SlurmSpec

# What DeepSpeed's own parser accepts, and no more.
_LINE = re.compile(r"([A-Za-z0-9_][\w.@-]*)\s+slots=(\d+)\s*(#.*)?")
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30")
# Prefixes of the variables that a rank on another machine needs. Others stay: ssh's arguments are public.
_SENT = ("NCCL_", "GLOO_", "UCX_", "PYTHON", "DS_", "OMP_")


@dataclass(frozen=True)
class Hostfile:
    """A checked hostfile.

    Attributes:
        slots: ranks per machine, in the file's order; rank 0 is on the first.
    """

    path: Path
    slots: dict[str, int]

    def check_ranks(self, stage: str, slurm: SlurmSpec) -> None:
        """Raise HpcRlhfError if a stage runs on another number of ranks."""
        ranks = sum(self.slots.values())
        if ranks != slurm.ranks:
            raise HpcRlhfError(
                f"the hostfile has {ranks} slots, but {stage} runs on {slurm.ranks} ranks "
                f"({slurm.nodes} nodes x {slurm.tasks_per_node})",
                where=str(self.path),
                hint="change the slots, or slurm.nodes and slurm."
                f"{'ranks' if slurm.ranks_per_node else 'gpus'}_per_node",
            )

    def master_address(self) -> str:
        """An address at which the other machines reach the first.

        Raises:
            HpcRlhfError: the first machine cannot be asked.
        """
        first = next(iter(self.slots))
        if len(self.slots) == 1 and is_here(first):
            return "127.0.0.1"
        query = ["hostname", "-I"]
        reply = subprocess.run(query if is_here(first) else [*_SSH, first, *query], capture_output=True, text=True)
        if reply.returncode or not reply.stdout.split():
            raise HpcRlhfError(
                f"cannot find the address of {first}: {reply.stderr.strip() or 'no reply'}",
                where=str(self.path),
                hint="make it reachable by ssh without a password, or set MASTER_ADDR to its address",
                exit_code=RUN_FAILED,
            )
        return reply.stdout.split()[0]

    def deepspeed(self, host: str, task: list[str], env: Mapping[str, str], gpus: list[str] | None = None) -> list[str]:
        """DeepSpeed's launcher for one machine's ranks, which its own runner would start through pdsh.

        The runner is not used, because it stops by killing all of the user's DeepSpeed jobs on these machines.

        Args:
            task: what a rank runs.
            env: with MASTER_ADDR and MASTER_PORT.
            gpus: GPUs of this machine, as in CUDA_VISIBLE_DEVICES; the first ones if None.
        """
        world: dict[str, Sequence[str | int]] = {name: list(range(n)) for name, n in self.slots.items()}
        if gpus is not None and len(gpus) == self.slots[host]:
            world[host] = gpus
        options = [
            "--log_level=warning",
            f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
            f"--node_rank={list(self.slots).index(host)}",
            f"--master_addr={env['MASTER_ADDR']}",
            f"--master_port={env['MASTER_PORT']}",
        ]
        return safe_path.module("deepspeed.launcher.launch", *options, "--no_python", "--no_local_rank", *task)

    def torchrun(self, host: str, task: list[str], env: Mapping[str, str]) -> list[str]:
        """torchrun for one machine's ranks; the arguments are those of ``deepspeed``."""
        options = [
            f"--nnodes={len(self.slots)}",
            f"--nproc-per-node={self.slots[host]}",
            f"--node-rank={list(self.slots).index(host)}",
            f"--master-addr={env['MASTER_ADDR']}",
            f"--master-port={env['MASTER_PORT']}",
        ]
        return safe_path.module("torch.distributed.run", *options, "--no-python", *task)


def is_here(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def on_host(host: str, folder: Path, command: list[str], env: Mapping[str, str]) -> list[str]:
    """A command that runs ``command`` on a machine, there in a folder and with the variables it needs."""
    if is_here(host):
        return command
    sent = [f"{name}={value}" for name, value in env.items() if name.startswith(_SENT)]
    return [*_SSH, host, f"cd {shlex.quote(str(folder))} && exec {shlex.join(['env', *sent, *command])}"]


def read_hostfile(path: Path) -> Hostfile:
    """Read a hostfile: lines of ``machine slots=N``, comments and empty lines.

    Raises:
        HpcRlhfError: it cannot be read, has a bad line, or names no machine.
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
                hint="a line names a machine and its number of GPUs, such as: node1 slots=8",
            )
        if match[1] in slots:
            raise HpcRlhfError(f"{match[1]} is named twice", where=f"{path}:{number}")
        slots[match[1]] = int(match[2])
    if not slots:
        raise HpcRlhfError("the hostfile names no machine", where=str(path), hint="add: localhost slots=1")
    return Hostfile(path.absolute(), slots)
