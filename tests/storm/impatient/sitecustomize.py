"""Makes ranks wait less long for a server that is silent."""

import sys
import threading
import time


def make_impatient() -> None:
    name = "hpc_rlhf.train.rollout.vllm.server"
    while not hasattr(sys.modules.get(name), "Server"):
        time.sleep(0.05)
    server = sys.modules[name]
    server.START_SECONDS, server.SILENCE_SECONDS = 600.0, 240.0  # type: ignore[attr-defined]


threading.Thread(target=make_impatient, daemon=True).start()
