"""A Python with vLLM that is none: it answers as the server does, or fails as the test wants.

Every response is the prompt's first token repeated, and its log-probabilities are minus the number of prompts asked
for at once. If it draws, both depend on the weights, the prompt and its seed.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hpc_rlhf.train.rollout.vllm.inside.hpc_rlhf_vllm import Connection

CHECKOUT = Path(__file__).parents[3]


def interpreter(folder: Path, behaviour: str) -> str:
    """A stand-in for vLLM's Python."""
    script = folder / "python"
    module = "tests.train.rollout.stand_in_vllm"
    script.write_text(
        f"#!/bin/sh\nunset PYTHONSAFEPATH; export PYTHONPATH={CHECKOUT}\n"
        f'exec {sys.executable} -m {module} {behaviour} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def main(behaviour: str, connection: Connection, memory: mmap.mmap) -> None:
    """Behave so; with ``-once``, only the first of the servers of a folder does."""
    arguments = connection.receive()
    behaviour, _, once = behaviour.partition("-")
    if once and not _is_first(Path(arguments["model"]) / "started"):
        behaviour = "answers"
    if behaviour == "refuses":
        connection.send({"error": f"ValueError: no such model as {arguments['model']}"})
        return
    if behaviour == "sleeps":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        print(f"sleeping {os.getpid()} {child.pid}", file=sys.stderr, flush=True)
        time.sleep(600)
    connection.send({"done": "0.0"})
    weights: dict[str, str] = {}
    version = None
    live: dict[str, list[int]] = {}  # the token of each response that is being drawn, and how many more
    while (message := connection.receive()) is not None:
        answer: Any = None
        do = message["do"]
        if do == "begin_weights":
            weights, version = {}, None
        elif do == "load_weights":
            for name, kind, shape, place in message["tensors"]:
                size = math.prod(shape) * (4 if kind == "float32" else 2)
                weights[name] = hashlib.sha256(memory[place : place + size]).hexdigest()
        elif do == "end_weights":
            version = message["version"] if weights else None
        elif do == "context":
            answer = 64
        elif do == "advance":
            _fail(behaviour, connection)
            answer = _advance(live, message)
        elif version != message["version"]:
            connection.send({"error": f"ValueError: the weights are {version}"})
            return
        elif behaviour == "draws":
            drawn_with = str(sorted(weights.items()))
            answer = {
                "version": version,
                "responses": [_drawn(drawn_with, message, i) for i in range(len(message["prompts"]))],
            }
            with (Path(arguments["model"]) / "drawn").open("a") as file:
                file.write(f"{hashlib.sha256(drawn_with.encode()).hexdigest()}\n")
        else:
            answer = _answer(behaviour, connection, message)
        connection.send({"done": answer})


def _answer(behaviour: str, connection: Connection, message: dict[str, Any]) -> Any:
    prompts, count = message["prompts"], message["sampling"]["max_tokens"]
    _fail(behaviour, connection)
    log_prob = float("nan") if behaviour == "garbles" else -float(len(prompts))
    responses = [[[prompt[0]] * count, [log_prob] * count] for prompt in prompts]
    return {
        "version": "another" if behaviour == "stale" else message["version"],
        "responses": responses[1:] if behaviour == "forgets" else responses,
    }


def _advance(live: dict[str, list[int]], message: dict[str, Any]) -> Any:
    for name in message["end"]:
        live.pop(name, None)
    live |= {name: [prompt[0], sampling["max_tokens"]] for name, prompt, sampling in message["begin"]}
    answer = []
    for name, response in list(live.items()):
        response[1] -= 1
        answer.append([name, response[:1], response[1] == 0])
        if response[1] == 0:
            del live[name]
    return answer


def _fail(behaviour: str, connection: Connection) -> None:
    if behaviour == "dies":
        print("a last word", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "hangs":
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "babbles":
        connection.socket.sendall((3).to_bytes(8, "little") + b"{]}")


def _drawn(weights: str, message: dict[str, Any], row: int) -> Any:
    """A response that ends after a random number of tokens, with log-probabilities."""
    numbers = random.Random(f"{weights} {message['prompts'][row]} {message['seeds'][row]}")
    tokens = []
    while len(tokens) < message["sampling"]["max_tokens"] and numbers.random() < 0.9:
        tokens.append(numbers.randrange(3, 250))
    tokens = tokens or [3]
    return [tokens, [-4 - 2 * numbers.random() for _ in tokens]]


def _is_first(file: Path) -> bool:
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1], Connection(socket.socket(fileno=int(sys.argv[-2]))), mmap.mmap(int(sys.argv[-1]), 0))
