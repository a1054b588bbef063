"""Votes and metrics over HTTP, and clients that mean harm."""

from __future__ import annotations

import json
import resource
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hpc_rlhf.run import feedback
from hpc_rlhf.run.feedback import MAX_RECORD, Vote
from hpc_rlhf.train.chat import load_models
from hpc_rlhf.train.server.voting import Voting
from tests.train.server.running import TOKEN, serving, small_model

HI = [{"role": "user", "content": "Hi"}]
MANIFESTS = {"sft": "5" * 64, "ppo": "9" * 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def base(run: Path) -> Iterator[str]:
    models = load_models({name: small_model(run / name, seed) for seed, name in enumerate(MANIFESTS)}, None)
    with serving(models, Voting(run / "feedback", MANIFESTS, record_user=False)) as base:
        yield base


@pytest.fixture
def client(base: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        yield client


def thumbs(**fields: Any) -> dict[str, Any]:
    return {"kind": "thumbs", "models": ["sft"], "messages": HI, "responses": ["Hello"], "vote": "up", **fields}


def pair(**fields: Any) -> dict[str, Any]:
    return thumbs(kind="pair", models=["ppo", "sft"], responses=["Hello", ""], **{"vote": "right", **fields})


def stored(run: Path) -> list[Vote]:
    return [vote for _, vote in feedback.read(run / "feedback") if vote is not None]


def metrics(client: httpx.Client) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(one.name, *one.labels.values()): one.value for each in families for one in each.samples}


def test_a_vote_is_stored_with_what_the_server_knows(client: httpx.Client, run: Path) -> None:
    id = str(uuid.uuid4())
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 12, "seed": 2**32 - 1}
    answer = client.post("/v1/feedback", json=pair(id=id, sampling=sampling, comment="Better.", user="Eve"))
    assert (answer.status_code, answer.json()) == (200, {"id": id, "object": "feedback"})
    vote = stored(run)[-1]
    assert [(each.name, each.manifest) for each in vote.models] == [("ppo", "9" * 64), ("sft", "5" * 64)]
    assert vote.sampling.model_dump() == sampling
    assert (vote.vote, vote.comment, vote.responses) == ("right", "Better.", ["Hello", ""])
    assert vote.user is None, "names are not recorded unless asked for"
    client.post("/v1/feedback", json=pair(id=id, vote="tie"))
    assert [each.vote for each in stored(run) if each.id == id] == ["tie"]
    assert client.post("/v1/feedback", json=thumbs()).json()["id"] == stored(run)[-1].id


def test_names_are_stored_where_the_server_records_them(run: Path, tmp_path: Path) -> None:
    models = load_models({"sft": run / "sft"}, None)
    with serving(models, Voting(tmp_path, MANIFESTS, record_user=True)) as base:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{base}/page/settings", headers=headers).json()["records_user"] is True
        httpx.post(f"{base}/v1/feedback", headers=headers, json=thumbs(user="Eve")).raise_for_status()
    assert [vote.user for _, vote in feedback.read(tmp_path) if vote] == ["Eve"]


def test_a_server_without_a_place_for_votes_says_so(run: Path) -> None:
    with serving(load_models({"sft": run / "sft"}, None)) as base:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{base}/page/settings", headers=headers).json()["stores_votes"] is False
        refused = httpx.post(f"{base}/v1/feedback", headers=headers, json=thumbs())
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_feedback")


def test_metrics_count_requests_tokens_times_and_votes(client: httpx.Client) -> None:
    before = metrics(client)
    body = {"model": "ppo", "messages": HI, "max_tokens": 5, "temperature": 0}
    drawn = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert client.get("/nowhere/to/be/found").status_code == 404
    client.post("/v1/feedback", json=pair(vote="right"))
    after = metrics(client)

    def rise(*key: str) -> float:
        return after.get(key, 0) - before.get(key, 0)

    assert rise("hpc_rlhf_requests_total", "/v1/chat/completions", "200") == 1
    assert rise("hpc_rlhf_requests_total", "other", "404") == 1, "paths of any number are one"
    assert rise("hpc_rlhf_prompt_tokens_total", "ppo") == drawn["prompt_tokens"]
    assert rise("hpc_rlhf_generated_tokens_total", "ppo") == drawn["completion_tokens"]
    assert rise("hpc_rlhf_time_to_first_token_seconds_count", "ppo") == 1
    assert rise("hpc_rlhf_time_per_token_seconds_count", "ppo") == drawn["completion_tokens"] - 1
    assert rise("hpc_rlhf_feedback_total", "sft", "win") == rise("hpc_rlhf_feedback_total", "ppo", "loss") == 1
    assert rise("hpc_rlhf_generated_tokens_total", "sft") == 0
    assert after["hpc_rlhf_requests_waiting", "ppo"] == after["hpc_rlhf_requests_running", "ppo"] == 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"id": "../../../tmp/evil"}, 400, "id"), ({"id": "a/b"}, 400, "id"), ({"id": ""}, 400, "id"),
        ({"id": 7}, 400, "id"), ({"kind": "stars"}, 400, "kind"), ({"kind": "pair"}, 400, "vote"),
        ({"vote": "left"}, 400, "vote"), ({"vote": "<script>"}, 400, "vote"), ({"models": []}, 400, "models"),
        ({"models": ["../ppo"]}, 404, "models"), ({"models": ["sft", "ppo"]}, 400, "vote"),
        ({"responses": []}, 400, "vote"), ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "vote"),
        ({"messages": [{"role": "root", "content": "Hi"}]}, 400, "messages[0].role"),
        ({"sampling": {"temperature": "hot"}}, 400, "sampling"), ({"sampling": {"file": "/etc"}}, 400, "sampling"),
        ({"comment": "x" * 4001}, 400, "comment"), ({"user": "x" * 101}, 400, "user"), ({"time": 1}, 400, "time"),
        ({"manifest": "x"}, 400, "manifest"), ({"responses": ["x" * MAX_RECORD]}, 413, None),
    ],
)  # fmt: skip
def test_what_is_no_vote_is_refused(
    client: httpx.Client, run: Path, fields: dict[str, Any], status: int, param: str | None
) -> None:
    before = len(stored(run))
    refused = client.post("/v1/feedback", json=thumbs(**fields))
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text
    assert len(stored(run)) == before


def test_hostile_text_is_stored_as_it_is_and_nothing_else_is_written(client: httpx.Client, run: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>\x00\u202e\n{}\n"
    before = {path for path in run.parent.rglob("*") if "feedback" not in path.parts}
    messages = [{"role": "system", "content": hostile}, {"role": "user", "content": hostile}]
    body = thumbs(messages=messages, responses=[hostile], comment=hostile)
    assert client.post("/v1/feedback", json=body).status_code == 200
    vote = stored(run)[-1]
    assert (vote.messages[0].content, vote.responses, vote.comment) == (hostile, [hostile], hostile)
    lone = json.dumps(thumbs(comment="?")).replace("?", "\\ud800").encode()
    assert client.post("/v1/feedback", content=lone, headers={"Content-Type": "application/json"}).status_code == 400
    assert {path for path in run.parent.rglob("*") if "feedback" not in path.parts} == before


@pytest.mark.parametrize("path", ["/v1/feedback", "/page/settings", "/metrics", "/feedback/votes-000001.jsonl"])
def test_votes_and_metrics_need_the_token(base: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer another"}):
        assert httpx.post(base + path, headers=headers, json=thumbs()).status_code == 401
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.post(base + path, headers={**right, "Host": "evil.example"}, json=thumbs()).status_code == 403


def test_the_page_lets_nothing_foreign_in(base: str) -> None:
    page = httpx.get(base)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"], policy["base-uri"]) == ("'none'", "'self'", "'none'")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "sft" not in page.text, "what needs no token tells nothing of the run"
    assert "://" not in page.text.replace("http://www.w3.org/2000/svg", ""), "it loads nothing"


def test_a_thousand_idle_connections_and_slow_readers_leave_the_server_up(base: str, client: httpx.Client) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # both ends of a connection are in this process
    address = ("127.0.0.1", int(base.rpartition(":")[2]))
    body = json.dumps({"model": "sft", "messages": HI, "max_tokens": 200, "stream": True}).encode()
    head = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n"
    request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Type: application/json\r\n\r\n".encode() + body
    with ExitStack() as open_ones:
        for number in range(1000):
            connection = open_ones.enter_context(socket.create_connection(address))
            if number % 20 == 0:
                connection.sendall(request)  # and never read
            elif number % 2:
                connection.sendall(request[: number % len(request)])
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/v1/feedback", json=thumbs()).status_code == 200
        drawn = client.post("/v1/chat/completions", json={"model": "ppo", "messages": HI, "max_tokens": 3})
        assert drawn.json()["usage"]["completion_tokens"] <= 3
    assert client.get("/health").status_code == 200


def test_long_bodies_at_once_do_not_fill_the_memory(base: str) -> None:
    """Forty clients announce 8 MiB each, of which 256 MiB are let in."""
    address = ("127.0.0.1", int(base.rpartition(":")[2]))
    head = f"POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {8 << 20}\r\n\r\n".encode()
    with ExitStack() as open_ones:
        several = [open_ones.enter_context(socket.create_connection(address)) for _ in range(40)]
        for connection in several:
            connection.sendall(request)
            connection.settimeout(0.2)
        refused = 0
        for connection in several:
            try:
                refused += b" 503 " in connection.recv(100)
            except TimeoutError:
                continue
        assert refused == 8
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.post(f"{base}/v1/feedback", headers=headers, json=thumbs()).status_code == 200
