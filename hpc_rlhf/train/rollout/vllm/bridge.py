"""Stands on the node of a rank for a server on another node, and ends when the rank does that started it.

It passes messages on to the server's ``agent``, and the weights that are in the shared memory with them. What the
server writes, it writes; and it ends as the server does.

Arguments: the folder with the agents' addresses, the number of the agent, vLLM's own Python, the number of its GPUs,
and the descriptors of the connection and of the memory for weights.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from hpc_rlhf import safe_path
from hpc_rlhf.train.rollout.vllm.agent import address_file
from hpc_rlhf.train.rollout.vllm.inside.hpc_rlhf_vllm import Connection
from hpc_rlhf.train.runtime import keeper


def main() -> None:
    folder, number, python, gpus, *descriptors = sys.argv[1:]
    keeper.continue_in_child(*map(int, descriptors))
    rank = Connection(socket.socket(fileno=int(descriptors[0])))
    memory = mmap.mmap(int(descriptors[1]), 0)
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":  # there, the job's script has started it
        subprocess.Popen(safe_path.module("hpc_rlhf.train.rollout.vllm.agent", folder, number))
    agent = _connect(address_file(Path(folder), int(number)))
    agent.send_bytes(json.dumps({"python": python, "memory": len(memory), "gpus": int(gpus)}).encode())
    threading.Thread(target=_pass_on, args=(rank, memory, agent), daemon=True).start()
    while True:
        try:
            message = json.loads(agent.recv_bytes())
        except (EOFError, OSError) as error:
            print(f"the connection to the node of the server broke off: {error}", flush=True)
            os._exit(1)
        if "log" in message:
            print(message["log"], end="", flush=True)
        elif "ended" in message:
            _end_as(message["ended"])
        else:
            rank.send(message)


def _connect(file: Path) -> Any:
    """A connection to an agent, as soon as it has started."""
    while True:
        try:
            at = json.loads(file.read_text())
            return Client((at["address"], at["port"]), authkey=bytes.fromhex(at["key"]))
        except (OSError, EOFError, ValueError, AuthenticationError):  # not there yet, or that of an earlier attempt
            time.sleep(1.0)


def _pass_on(rank: Connection, memory: mmap.mmap, agent: Any) -> None:
    """Pass on what the rank says, to its end."""
    while (message := rank.receive()) is not None:
        agent.send_bytes(json.dumps(message).encode())
        if message.get("do") == "load_weights":
            agent.send_bytes(memoryview(memory)[: message["used"]])
    os._exit(0)


def _end_as(code: int) -> None:
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
