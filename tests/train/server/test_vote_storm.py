"""Clients vote at the same time while their server is killed: no vote that was acknowledged is lost or doubled."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run import feedback
from tests.train.server.running import TOKEN

MODULE = "tests.train.server.running"


@contextmanager
def server(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-m", MODULE, str(port), str(folder)], stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_an_acknowledged_vote_is_there_once(tmp_path: Path) -> None:
    clients, total, kills = 20, 200, 3
    port = free_port()
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"})
    acknowledged: dict[str, str] = {}
    struck = [threading.Event() for _ in range(kills)]

    def vote(number: int) -> None:
        """Vote until it is acknowledged, as the page does when someone tries again."""
        id, comment = str(uuid.uuid4()), f"{number} " * 1000
        body = {
            "id": id, "kind": "thumbs", "models": ["sft"], "messages": [{"role": "user", "content": "Hi"}],
            "responses": ["White."], "vote": "up", "comment": comment[:4000],
        }  # fmt: skip
        while True:
            try:
                answer = client.post("/v1/feedback", json=body)
            except httpx.TransportError:
                time.sleep(0.5)
                continue
            assert answer.json() == {"id": id, "object": "feedback"}
            acknowledged[id] = body["comment"]
            break
        for place, event in enumerate(struck, 1):
            if len(acknowledged) >= place * total // (kills + 1):
                event.set()

    with client, ThreadPoolExecutor(clients) as threads:
        sent = threads.map(vote, range(total))
        for event in struck:
            with server(port, tmp_path):
                assert event.wait(300)
        with server(port, tmp_path):
            assert len(list(sent)) == total
    read = [each for _, each in feedback.read(tmp_path)]
    assert read.count(None) <= kills, "a line may be torn by each kill"
    assert {each.id: each.comment for each in read if each} == acknowledged
    assert Counter(each.id for each in read if each).most_common(1)[0][1] == 1
    assert len(acknowledged) == total
