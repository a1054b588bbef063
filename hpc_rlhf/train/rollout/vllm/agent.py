"""Runs one of a stage's servers on a node on which nothing trains, for a rank on another node.

``python -m hpc_rlhf.train.rollout.vllm.agent FOLDER [NUMBER]`` listens at a private address, and writes it into the
folder, with a key that it makes, for the owner's eyes only. A rank's ``bridge`` connects and proves that it knows the
key. Then a server starts, which ends with the connection; for the next connection, another one does.

Messages are JSON. From the bridge: first vLLM's own Python and the bytes of memory that its weights need, and then what
the rank says to the server; the bytes of weights follow the message that announces them. To the bridge: what the server
says; ``log``, a line of its output; ``ended``, its exit code.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection as Channel
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from hpc_rlhf.run.files import make_folder
from hpc_rlhf.train.rollout.vllm.inside.hpc_rlhf_vllm import Connection
from hpc_rlhf.train.rollout.vllm.process import Process
from hpc_rlhf.train.runtime import keeper
from hpc_rlhf.train.runtime.launcher import launcher_ranks

# Seconds in which a bridge must prove that it knows the key.
_PROOF_SECONDS = 10


def address_file(folder: Path, number: int) -> Path:
    """Where an agent writes its address and its key."""
    return folder / f"agent-{number}.json"


class Agent:
    """Serves one bridge after another.

    Slurm signals all steps of a job. SIGTERM ends an agent only once it has no bridge: until then the ranks are saving.
    """

    def __init__(self) -> None:
        self.serves = self.leaves = False
        for ignored in set(keeper.RANK_SIGNALS) - {signal.SIGTERM}:
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, *_: object) -> None:
        self.leaves = True
        if not self.serves:
            sys.exit(0)

    def listen(self, file: Path) -> None:
        key = secrets.token_bytes(32)
        with socket.create_server((_own_address(), 0)) as listener:
            address, port = listener.getsockname()[:2]
            _write(file, {"address": address, "port": port, "key": key.hex()})
            while not self.leaves:
                channel = _proven(listener.accept()[0], key)
                if channel is not None:
                    self.serves = True
                    with channel:
                        _serve(channel)
                    self.serves = False


def _own_address() -> str:
    """The address from which this node reaches rank 0."""
    family, *_, where = socket.getaddrinfo(os.environ.get("MASTER_ADDR", "127.0.0.1"), 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        address: str = probe.getsockname()[0]
        return address


def _write(file: Path, facts: dict[str, Any]) -> None:
    make_folder(file.parent)
    partial = file.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump(facts, opened)
    partial.replace(file)


def _proven(connected: socket.socket, key: bytes) -> Channel | None:
    """A channel over a connection whose other side knows the key, as this side proves, too."""
    limit = struct.pack("ll", _PROOF_SECONDS, 0)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    with suppress(OSError, EOFError, AuthenticationError):
        channel = Channel(os.dup(connected.fileno()))
        deliver_challenge(channel, key)
        answer_challenge(channel, key)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        connected.close()
        return channel
    connected.close()
    return None


def _serve(channel: Channel) -> None:
    """Run a server until it ends or the connection does."""
    try:
        first = json.loads(channel.recv_bytes())
    except (OSError, EOFError):
        return
    process = Process(("start", first["python"]), first["memory"], _gpus(first["gpus"]))
    server, lock = Connection(process.socket), threading.Lock()

    def send(message: Any) -> None:
        with lock, suppress(OSError):
            channel.send_bytes(json.dumps(message).encode())

    def ask() -> None:
        with suppress(OSError, EOFError):
            while True:
                message = json.loads(channel.recv_bytes())
                if message.get("do") == "load_weights":
                    channel.recv_bytes_into(process.memory)
                server.send(message)

    def answer() -> None:
        try:
            while (message := server.receive()) is not None:
                send(message)
        except OSError:
            return
        except ValueError:
            send("no JSON")

    def log() -> None:
        assert process.popen.stdout is not None
        for line in process.popen.stdout:
            send({"log": line.decode(errors="replace")})
        answers.join()
        send({"ended": process.popen.wait()})

    answers = threading.Thread(target=answer)
    threads = [answers, threading.Thread(target=ask), threading.Thread(target=log)]
    for thread in threads:
        thread.start()
    closed = select.poll()
    closed.register(channel, select.POLLRDHUP)
    closed.poll()
    process.end()
    for thread in threads:
        thread.join()


def _gpus(size: int) -> dict[str, str]:
    """The environment with the share of this node's GPUs that is this agent's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return {}
    first = size * (launcher_ranks()[2] if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else 0)
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[first : first + size])}


def main() -> None:
    folder, *number = sys.argv[1:]
    Agent().listen(address_file(Path(folder), int(number[0]) if number else launcher_ranks()[0]))


if __name__ == "__main__":
    main()
