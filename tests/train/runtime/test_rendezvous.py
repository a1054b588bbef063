"""Ranks meet at a store that only this run's processes know, and exchange nothing that can run code."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

import hpc_rlhf.train
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run import secret
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.train.runtime.rendezvous import open_store
from tests.co_user import as_co_user, as_root

SOON = timedelta(seconds=20)
LIMIT = timedelta(seconds=2)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return int(os.environ["MASTER_PORT"])


def open_all(*secrets: bytes, timeout: timedelta = SOON) -> list[dist.Store | HpcRlhfError]:
    """What each rank gets, where each has a secret of its own."""

    def one(rank: int) -> dist.Store | HpcRlhfError:
        try:
            return open_store(secrets[rank], rank, len(secrets), timeout)
        except HpcRlhfError as error:
            return error

    with ThreadPoolExecutor(len(secrets)) as pool:
        return list(pool.map(one, range(len(secrets))))


def test_ranks_with_the_secret_meet_and_others_see_none_of_their_keys(port: int) -> None:
    main, other = open_all(b"secret", b"secret")
    assert isinstance(main, dist.Store)
    assert isinstance(other, dist.Store)
    main.set("address", "here")
    assert other.get("address") == b"here"
    stranger = dist.TCPStore("127.0.0.1", port, timeout=LIMIT)
    stranger.set("address", "elsewhere")
    assert not stranger.check(["rank 1"])
    assert main.get("address") == b"here"


def test_alone_it_needs_nobody(port: int) -> None:
    (store,) = open_all(b"secret")
    assert isinstance(store, dist.Store)


def test_a_rank_without_the_secret_is_refused(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=SOON, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 does not start one
    try:
        # The prefix is no secret to who can list the keys.
        from hpc_rlhf.train.runtime.rendezvous import _digest

        dist.PrefixStore(_digest(b"secret", "store"), store).set("rank 1", f"nonce {_digest(b'guess', 'rank 1 nonce')}")
        with pytest.raises(HpcRlhfError, match="calls itself rank 1 does not know this run's secret") as error:
            open_store(b"secret", 0, 2, SOON)
    finally:
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    assert error.value.where == f"127.0.0.1:{port}"
    assert error.value.exit_code == 1


@pytest.mark.parametrize("answer", ["", "0" * 64, "known"])
def test_who_takes_the_port_first_is_not_believed(port: int, answer: str) -> None:
    """It sees the keys that a rank asks for, and can answer whatever it likes."""
    fake = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=SOON, wait_for_workers=False)

    def pose_as_rank_0() -> None:
        while not (keys := [key for key in fake.list_keys() if key.endswith("rank 1")]):
            pass
        _, _, proof = fake.get(keys[0]).decode().partition(" ")
        fake.set(keys[0].replace("rank 1", "main 1"), proof if answer == "known" else answer)

    thread = threading.Thread(target=pose_as_rank_0)
    thread.start()
    with pytest.raises(HpcRlhfError, match="calls itself rank 0 does not know this run's secret"):
        open_store(b"secret", 1, 2, SOON)
    thread.join()


def test_ranks_of_one_machine_listen_to_it_alone(port: int) -> None:
    (store,) = open_all(b"secret")
    assert store is not None
    outer = next((info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), "127.0.0.1")
    if outer.startswith("127."):
        outer = "127.0.0.2"
    with socket.socket() as stranger, pytest.raises(ConnectionRefusedError):
        stranger.connect((outer, port))
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")


def test_all_ranks_read_the_same_secret(tmp_path: Path) -> None:
    program = "import sys, pathlib\nfrom hpc_rlhf.run import layout, secret\n"
    program += "sys.stdin.readline()\nprint(secret.read(layout.RunDir(pathlib.Path(sys.argv[1]))).decode())"
    command = [sys.executable, "-c", program, str(tmp_path)]
    ranks = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    found = {rank.communicate(timeout=60)[0] for rank in ranks}
    assert len(found) == 1
    assert len(found.pop().strip()) == 64
    assert [path.name for path in tmp_path.iterdir()] == [".secret"]


@as_root
def test_a_co_user_cannot_read_the_secret(public: Path) -> None:
    run = RunDir(public)
    secret.read(run)
    assert as_co_user(lambda: list(public.iterdir()))
    assert not as_co_user(run.secret.read_bytes)


def test_no_rank_exchanges_or_loads_pickles() -> None:
    """torch's collectives of objects unpickle what arrives."""
    banned = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list"}
    banned |= {"recv_object_list", "pickle", "cloudpickle", "dill"}
    for file in Path(hpc_rlhf.train.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = {getattr(node, "attr", None), getattr(node, "id", None)}
            names |= {alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)}
            assert not names & banned, f"{file}:{getattr(node, 'lineno', 0)}"
