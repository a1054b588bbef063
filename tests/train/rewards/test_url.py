"""A server's rewards arrive in order; one that fails is asked again, and its failures are explained."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.rewards import http_client
from hpc_rlhf.train.rewards.text import Failure, TextBatch
from hpc_rlhf.train.rewards.url import BATCH, UrlReward

EXAMPLE = Path(__file__).parents[3] / "examples/reward_server.py"


class Server(ThreadingHTTPServer):
    """Answers with the codes and bodies in ``answers``, one after the other, and then with each response's length."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, Any]] = []
        self.requests: list[tuple[dict[str, Any], str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((batch, self.headers["Authorization"]))
        lengths = {"rewards": [len(response) or None for response in batch["responses"]]}
        code, body = self.server.answers.pop(0) if self.server.answers else (200, lengths)
        self.send_response(code)
        self.send_header("Location" if code == 302 else "Retry-After", str(body) if code == 302 else "0")
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def batch_of(responses: list[str]) -> TextBatch:
    columns = {"answer": list(range(len(responses)))}
    return TextBatch([f"prompt of {text}" for text in responses], responses, [[]] * len(responses), columns)


def test_all_responses_get_their_reward_with_prompt_columns_and_token(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    reward = UrlReward(server.url, "TOKEN", 20)
    responses = ["x" * number for number in range(BATCH + 3)]
    assert reward.judge(batch_of(responses)) == [None, *range(1, BATCH + 3)]
    assert reward.judge(batch_of([])) == []
    reward.pool.close()
    (first, token), (second, _) = sorted(server.requests, key=lambda request: request[0]["columns"]["answer"])
    assert token == "Bearer s3cret"
    assert set(first) == {"prompts", "responses", "columns"}
    assert first["columns"]["answer"] + second["columns"]["answer"] == list(range(BATCH + 3))
    assert second["prompts"][-1] == f"prompt of {responses[-1]}"


def test_a_busy_server_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "PAUSES", (0.01, 0.01))
    ask = http_client.make(server.url, None, 5)
    server.answers = [(503, {}), (429, {})]
    assert ask({"responses": ["abc"]}) == [3]
    server.answers = [(503, {})] * 3
    assert ask({"responses": ["abc"]}) == "the server answered 503 Service Unavailable, in 3 tries"
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("code", "body", "why"),
    [
        (401, {}, "the server answered 401 Unauthorized"),
        (200, b"<html>", "the server's answer is not an object with rewards: b'<html>'"),
        (200, [1.0], "the server's answer is not an object with rewards: b'[1.0]'"),
        (200, {"rewards": [1.0, 2.0]}, "the server did not return a list of 1 numbers: b'{\"rewards\": [1.0, 2.0]}'"),
        (200, {"rewards": ["1"]}, 'the server did not return a list of 1 numbers: b\'{"rewards": ["1"]}\''),
        (200, b'{"rewards": [1' + b"0" * 400 + b"]}", "the server returned a number that is too large: b'{"),
        (302, "http://127.0.0.1:1/", "the server answered 302 Found"),
    ],
)
def test_a_wrong_answer_is_not_asked_for_again(server: Server, code: int, body: Any, why: str) -> None:
    server.answers = [(code, body)]
    assert str(http_client.make(server.url, None, 5)({"responses": ["a"]})).startswith(why)
    assert len(server.requests) == 1


def test_a_failure_is_that_of_its_batch(server: Server) -> None:
    server.answers = [(400, {})]
    reward = UrlReward(server.url, None, 20)
    scores = reward.judge(batch_of(["a"] * (BATCH + 1)))
    reward.pool.close()
    failure = Failure("the server answered 400 Bad Request", RUN_FAILED)
    assert sorted(scores, key=str) in ([1, *[failure] * BATCH], [failure, *[1] * BATCH], [*[1] * BATCH, failure])


def test_a_missing_token_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "two\nlines")
    for name in ("TOKEN", "MISSING_TOKEN"):
        with pytest.raises(HpcRlhfError, match=f"variable {name} has no token"):
            UrlReward("http://127.0.0.1", name, 1)


def test_the_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, EXAMPLE, str(port)], stderr=subprocess.DEVNULL) as process:
        ask = http_client.make(f"http://127.0.0.1:{port}", None, 5)  # it tries again until the server is there
        assert ask({"responses": ["", "x" * 500]}) == [1.0, 0.5]
        process.kill()
