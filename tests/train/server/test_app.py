"""The server through OpenAI's own client: its responses, and its refusals in OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hpc_rlhf.train.chat import ChatModel
from hpc_rlhf.web.access import MAX_BODY, Guard
from tests.train.server.running import CONTEXT, TOKEN, serving, small_model

TURNS = [("system", "Be brief."), ("human", " Hi "), ("assistant", "Hello."), ("human", "What colour is snow?")]
ROLES = {"human": "user", "assistant": "assistant", "system": "system"}
MESSAGES: Any = [{"role": ROLES[role], "content": text} for role, text in TURNS]
HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return ChatModel(folder)


@pytest.fixture(scope="module")
def base(model: ChatModel) -> Iterator[str]:
    with serving({"sft": model}) as base:
        yield base


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, messages: Any = HI, **fields: Any) -> Any:
    fields = {"model": "sft", "max_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(messages=messages, **fields)


def text_of(completion: Any) -> str:
    return str(completion.choices[0].message.content)


def test_a_response_is_that_of_chat_at_once_and_streamed(client: openai.OpenAI, folder: Path) -> None:
    whole = ask(client, MESSAGES)
    *chunks, last = ask(client, MESSAGES, stream=True, stream_options={"include_usage": True})
    streamed = [chunk.choices[0].delta.content or "" for chunk in chunks]
    chat = ChatModel(folder)
    assert text_of(whole) == "".join(streamed) == "".join(chat.stream(TURNS, 12, 0.0, seed=0)) != ""
    assert len([piece for piece in streamed if piece]) > 1, "it streams"
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.usage == last.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(chat.prompt(TURNS)), 12)
    assert last.choices == []


def test_text_may_come_in_parts_and_a_developer_is_the_system(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": MESSAGES[0]["content"][:4]}, {"type": "text", "text": MESSAGES[0]["content"][4:]}]
    assert text_of(ask(client, [{"role": "developer", "content": parts}, *MESSAGES[1:]])) == text_of(
        ask(client, MESSAGES)
    )


def test_models_are_the_one_that_is_served(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sft"]
    assert client.models.retrieve("sft").owned_by == "hpc-rlhf"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("facebook/opt-125m")
    assert refused.value.code == "model_not_found"


def test_temperature_top_p_and_seed_are_heeded(client: openai.OpenAI) -> None:
    def drawn(**fields: Any) -> str:
        return text_of(ask(client, max_tokens=60, **fields))

    assert drawn(temperature=1, seed=1) == drawn(temperature=1, seed=1) != drawn(temperature=1, seed=2)
    assert drawn(temperature=1) != drawn(temperature=1), "without a seed"
    assert drawn(temperature=2, seed=1) != drawn(temperature=1, seed=1)
    assert drawn(temperature=0, seed=1) == drawn(temperature=0, seed=2) == drawn(temperature=1, top_p=1e-9)


def test_a_temperature_too_small_to_divide_by_is_greedy(client: openai.OpenAI) -> None:
    assert text_of(ask(client, temperature=1e-39)) == text_of(ask(client, temperature=0))


def test_a_response_ends_before_a_stop_text(client: openai.OpenAI) -> None:
    whole = text_of(ask(client, max_tokens=40))
    stop = next(character for character in whole[5:] if character.isalnum() and character not in whole[:5])
    for stops in (stop, ["not in it", stop]):
        cut = ask(client, max_tokens=40, stop=stops)
        assert text_of(cut) == whole.partition(stop)[0].rstrip()
        assert cut.choices[0].finish_reason == "stop"
        assert cut.usage.completion_tokens < 40
        chunks = list(ask(client, max_tokens=40, stop=stops, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(cut)


def test_requests_share_forward_passes(
    client: openai.OpenAI, model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    advance = model.batch.advance

    def counted() -> list[Any]:
        advanced = advance()
        together.append(len(advanced))
        return advanced

    def one(number: int) -> str:
        return text_of(
            ask(client, [{"role": "user", "content": f"Say {number}"}], max_tokens=100, temperature=1, seed=3)
        )

    expected = [one(number) for number in range(8)]
    monkeypatch.setattr(model.batch, "advance", counted)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(8))) == expected
    assert max(together) >= 4, together


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_response(
    client: openai.OpenAI, model: ChatModel, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = model.batch.advance

    def slow() -> list[Any]:
        time.sleep(0.02)  # 4 s in all
        return advance()

    monkeypatch.setattr(model.batch, "advance", slow)
    if stream:
        with ask(client, max_tokens=200, stream=True) as chunks:
            next(chunk for chunk in chunks if chunk.choices[0].delta.content)
            assert model.batch.live
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client, max_tokens=200, timeout=0.3)
    deadline = time.monotonic() + 2
    while model.batch.live and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not model.batch.live


def test_a_response_has_the_rest_of_the_context_and_no_more(client: openai.OpenAI) -> None:
    prompt = ask(client).usage.prompt_tokens
    whole = ask(client, max_tokens=None, temperature=1, seed=1)
    assert prompt + whole.usage.completion_tokens == CONTEXT or whole.choices[0].finish_reason == "stop"
    ask(client, max_tokens=CONTEXT - prompt)
    for fields in ({"max_tokens": CONTEXT - prompt + 1}, {"max_tokens": None, "max_completion_tokens": 10**9}):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, **fields)
        assert refused.value.code == "context_length_exceeded"


IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]
TOOL = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [*HI, {"role": "robot", "content": "Hi"}]}, "messages[1].role", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "Hi", "tool_call_id": "1"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content", "invalid_value"),
        ({"messages": [*HI, {"role": "assistant", "content": "I"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * CONTEXT}]}, "messages", "context_length_exceeded"),
        ({"messages": [{**HI[0], "audio": {"id": "1"}}]}, "audio", "unknown_parameter"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"n": 0}, "n", "unsupported_value"),
        ({"logprobs": True}, "logprobs", "unsupported_value"),
        ({"top_logprobs": 2}, "top_logprobs", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "unsupported_value"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_value"),
        ({"presence_penalty": -1}, "presence_penalty", "unsupported_value"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "unsupported_value"),
        ({"tools": TOOL}, "tools", "unsupported_value"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_value"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unknown_parameter"),
        ({"extra_body": {"top_k": 3}}, "top_k", "unknown_parameter"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": 0.5}, "seed", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": True}, "max_completion_tokens", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": list("abcde")}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_would_be_ignored_or_fail_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **{"messages": HI, "stream": stream, **fields})
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.type == "invalid_request_error"


def test_what_changes_nothing_is_accepted(client: openai.OpenAI) -> None:
    spoken = {**ask(client).choices[0].message.model_dump(), "type": "text"}  # with refusal, tool_calls and others
    fields: dict[str, Any] = {
        "n": 1, "logprobs": False, "response_format": {"type": "text"}, "frequency_penalty": 0.0, "logit_bias": {},
        "user": "me", "metadata": {"a": "b"}, "store": False, "tool_choice": "none", "stop": None, "top_p": 1,
    }  # fmt: skip
    assert text_of(ask(client, [*HI, spoken, *HI], **fields)) == text_of(ask(client, [*HI, spoken, *HI]))


def test_another_model_and_other_endpoints_do_not_exist(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model="ppo")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match="POST /v1/responses"):
        client.responses.create(model="sft", input="Hi")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):
        client.embeddings.create(model="sft", input="Hi")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"Hi"', b"\xff", b"null", b'{"model": "sft"}',
        b'{"model": "sft", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "Hi"}]}',
        b'{"model": "sft", "messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
        b'{"model": "sft", "messages": [{"role": "user", "content": "Hi"}], "seed": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_body_of_any_kind_is_refused_in_the_same_shape(base: str, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    response = httpx.post(f"{base}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{base}/v1/chat/completions", headers=headers).json()["error"]["type"] == "invalid_request_error"


def test_the_server_responds_while_it_reads_a_long_message(base: str, client: openai.OpenAI) -> None:
    """Health is asked for often while the message is tokenized, instead of once after it."""
    message = [{"role": "user", "content": "Hello there. " * 50_000}]
    answers = 0
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(pytest.raises, openai.BadRequestError, ask, client, message)
        while not refused.done():
            assert httpx.get(f"{base}/health").status_code == 200
            answers += 1
    assert "context length" in str(refused.result().value)
    assert answers > 5


@pytest.mark.parametrize(("body", "status"), [(bytes(MAX_BODY + 1), 413), (iter([b"{}"]), 411)])
def test_a_body_without_bounds_is_refused(base: str, body: Any, status: int) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    refused = httpx.post(f"{base}/v1/chat/completions", headers=headers, content=body)
    assert (refused.status_code, refused.json()["error"]["type"]) == (status, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_reported_and_the_next_request_is_served(
    client: openai.OpenAI, model: ChatModel, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(model.batch, "_step", fail)
        with pytest.raises(openai.APIError, match="The model failed") as failed:
            list(ask(client, stream=stream))
    assert failed.value.type == "server_error"
    assert text_of(ask(client))


def test_clients_need_the_token(base: str) -> None:
    for key in ("another", TOKEN + "x", TOKEN[:-1]):
        with openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"
    for credentials in ("", TOKEN, f"Basic {TOKEN}", f"Bearer  {TOKEN}", "Bearer é"):
        headers = {b"Authorization": credentials.encode()}
        assert httpx.get(f"{base}/v1/models", headers=headers).status_code == 401
    closed = ("/v1/models", "/v1/chat/completions", "/metrics", "/page/settings", "/docs", "/openapi.json")
    for path in (*closed, "//", "//health", "/health/"):
        assert httpx.get(base + path).status_code == 401
    assert httpx.get(f"{base}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:9000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("10.0.0.7", 200),
        ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403), ("", 403), ("[::1", 403),
        ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 403), ("evil.example#localhost", 403),
    ],
)  # fmt: skip
def test_the_host_must_be_this_machine(base: str, host: str, status: int) -> None:
    for path in ("/v1/models", "/health"):
        response = httpx.get(base + path, headers={"Host": host, "Authorization": f"Bearer {TOKEN}"})
        assert response.status_code == status
        assert status == 200 or response.json()["error"]["code"] == "invalid_host"


@pytest.mark.parametrize(
    ("listens_on", "ours"),
    [
        ("127.0.0.1", {"localhost"}),
        ("node7.cluster", {"localhost", "node7.cluster"}),
        ("0.0.0.0", {"localhost", "login", "login.cluster"}),
    ],
)
def test_a_name_of_this_machine_is_ours_where_the_server_listens_on_its_addresses(
    listens_on: str, ours: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "login")
    monkeypatch.setattr("socket.getfqdn", lambda: "Login.Cluster")

    async def app(*_: object) -> None: ...

    guard = Guard(app, TOKEN, listens_on)
    credentials = (b"authorization", f"Bearer {TOKEN}".encode())
    for host in ("localhost", "login", "login.cluster", "node7.cluster", "evil.example"):
        scope = {"path": "/v1/models", "headers": [(b"host", f"{host}:8000".encode()), credentials]}
        assert (guard.objection(scope) is None) == (host in ours), host
