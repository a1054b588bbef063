"""Where the ranks meet: a TCP store whose keys only this run's ranks know.

Anybody who reaches the store's port can connect to it, and another user may listen there before rank 0 does. So the
ranks share a secret. The store's keys begin with a digest of it, and before anything else is exchanged, rank 0 and each
other rank prove to each other that they know it.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError


def open_store(secret: bytes, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT. Rank 0 starts it, unless torchrun has. Collective.

    With a loopback address, neither the store nor gloo or NCCL listen to other machines.

    Raises:
        HpcRlhfError: another process there does not know the secret.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if _is_loopback(address) and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    starts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listener = _listen(address, port) if starts else None
    server = dist.TCPStore(
        address, port, is_master=starts, timeout=timeout, wait_for_workers=False, master_listen_fd=listener
    )
    store = dist.PrefixStore(_digest(secret, "store"), server)
    if rank == 0:
        for other in range(1, size):
            nonce, _, proof = store.get(f"rank {other}").decode().partition(" ")
            _check(proof, _digest(secret, f"rank {other} {nonce}"), f"rank {other}")
            store.set(f"main {other}", _digest(secret, f"main {other} {nonce}"))
    else:
        nonce = secrets.token_hex(16)
        store.set(f"rank {rank}", f"{nonce} {_digest(secret, f'rank {rank} {nonce}')}")
        _check(store.get(f"main {rank}").decode(), _digest(secret, f"main {rank} {nonce}"), "rank 0")
    return store


def _digest(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), "sha256").hexdigest()


def _check(proof: str, expected: str, who: str) -> None:
    if not hmac.compare_digest(proof, expected):
        raise HpcRlhfError(
            f"a process that calls itself {who} does not know this run's secret",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            hint="another user may have taken the port; the next attempt uses another one",
            exit_code=RUN_FAILED,
        )


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _listen(address: str, port: int) -> int | None:
    """A socket that listens at this address only; None leaves it to torch, which listens at all of them."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(socket.SOMAXCONN)
    except OSError:  # such as the outer address of a machine behind a router
        return None
    return listener.detach()
