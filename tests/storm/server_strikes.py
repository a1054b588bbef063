"""Faults of inference servers. They are started again in the same attempt, which ends only if they fail too often."""

from __future__ import annotations

import os
import signal

from hpc_rlhf.run import reasons as causes
from tests.cluster.processes import find
from tests.storm.strikes import Fault, Victim


def kill_a_server(victim: Victim) -> frozenset[str] | None:
    return _signal_a_server(victim, signal.SIGKILL)


def stop_a_server(victim: Victim) -> frozenset[str] | None:
    """Let a server hang."""
    return _signal_a_server(victim, signal.SIGSTOP)


def _signal_a_server(victim: Victim, number: int) -> frozenset[str] | None:
    mine = f"STORM={victim.storm}"
    servers = find(lambda process: "hpc_rlhf_vllm.py" in process.command() and mine in process.environ())
    if not servers:
        return None
    os.kill(victim.random.choice(sorted(servers, key=lambda process: process.pid)).pid, number)
    return frozenset({causes.INFERENCE_ENGINE})


SERVER_FAULTS = (Fault(kill_a_server, 8, blamed=True), Fault(stop_a_server, 5, blamed=True))
