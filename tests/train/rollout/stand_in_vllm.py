"""A Python with vLLM that is none: it answers as the server does, or fails as the test wants.

Every response is the prompt's first token repeated; its log-probabilities are those of the version's length.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from hpc_rlhf.train.rollout.vllm.inside.hpc_rlhf_vllm import Connection


def main(behaviour: str, connection: Connection) -> None:
    arguments = connection.receive()
    if behaviour == "refuses":
        connection.send({"error": f"ValueError: no such model as {arguments['model']}"})
        return
    if behaviour == "sleeps":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        print(f"sleeping {os.getpid()} {child.pid}", file=sys.stderr, flush=True)
        time.sleep(600)
    connection.send({"done": "0.0"})
    loaded: dict[str, Any] = {}
    while (message := connection.receive()) is not None:
        if behaviour == "dies" and message["do"] == "generate":
            os.kill(os.getpid(), signal.SIGKILL)
        if message["do"] == "load_weights":
            loaded.update((name, shape) for name, _, shape, _ in message["tensors"])
        answer: Any = None
        if message["do"] == "generate":
            count = message["sampling"]["max_tokens"]
            version = "another" if behaviour == "stale" else message["version"]
            answer = {
                "version": version,
                "responses": [[[prompt[0]] * count, [-0.5] * count] for prompt in message["prompts"]],
                "asked": len(message["prompts"]),
            }
        connection.send({"done": answer})


if __name__ == "__main__":
    main(sys.argv[1], Connection(socket.socket(fileno=int(sys.argv[-2]))))
