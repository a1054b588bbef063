"""Why an attempt ended: the reasons that the ledger records, and what kind of failure a message shows."""

from __future__ import annotations

import re

PREEMPTED, TIME_LIMIT, NODE_FAILURE = "preempted", "time limit", "node failure"
OUT_OF_MEMORY, KILLED_FOR_MEMORY, KILLED = "out of memory", "killed for memory", "killed"
NETWORK, HANG, FAILED, LAUNCH_FAILURE = "NCCL or gloo error", "hang", "failed", "launch failure"
USER_ERROR, PAST_DEADLINE = "user error", "past its deadline"
NO_NODES_LEFT = "no nodes left"
INFERENCE_ENGINE = "inference engine failed"
CANCELLED_BY_TOOL, CANCELLED_BY_HAND = "cancelled by hpc-rlhf", "cancelled by hand"
REQUEUED_BY_HAND = "requeued by hand"
STOPPED_EARLY = "stopped early"

# Another attempt would end the same way.
FINAL = frozenset({USER_ERROR, PAST_DEADLINE, STOPPED_EARLY, CANCELLED_BY_TOOL, CANCELLED_BY_HAND})
# Caused by the cluster, so they say nothing about whether the stage can continue.
BLAMELESS = frozenset({PREEMPTED, NODE_FAILURE, LAUNCH_FAILURE, REQUEUED_BY_HAND, NO_NODES_LEFT})
# A node on which these recur should be excluded.
ON_A_NODE = frozenset({
    NODE_FAILURE, LAUNCH_FAILURE, KILLED, KILLED_FOR_MEMORY, OUT_OF_MEMORY, INFERENCE_ENGINE, NETWORK, HANG, FAILED,
})  # fmt: skip

_MEMORY = re.compile(
    r"out of memory|outofmemory|cannot allocate memory|can't allocate memory|bad_alloc|MemoryError", re.I
)
_CONNECTION = re.compile(
    r"nccl|gloo|DistBackendError|DistNetworkError|DistStoreError|TCPStore|"
    r"connection (was )?(reset|closed|refused)|broken pipe|socket timeout",
    re.I,
)
# How messages about an inference engine begin.
ENGINE_FAILED, ENGINE_DID_NOT_START = "vLLM failed: ", "vLLM did not start: "
_PEER_GONE = re.compile(r"connection (was )?(reset|closed)|broken pipe", re.I)


def is_out_of_memory(message: str) -> bool:
    """Whether memory ran out, on the GPU or on the node."""
    return _MEMORY.search(message) is not None


def is_of_engine(message: str) -> bool:
    """Whether the inference engine failed, perhaps with a message that would otherwise show another kind."""
    return ENGINE_FAILED in message or ENGINE_DID_NOT_START in message


def is_consequence(message: str) -> bool:
    """Whether a rank only lost its connection to another one, which probably failed first."""
    return _CONNECTION.search(message) is not None and not (is_out_of_memory(message) or is_of_engine(message))


def is_peer_gone(message: str) -> bool:
    """Whether the other end of a connection closed it, as the death of its process does."""
    return _PEER_GONE.search(message) is not None
