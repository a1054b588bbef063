"""The endpoints of the server, and its errors in the shape of OpenAI's."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.chat import ChatModel, sampling_at
from hpc_rlhf.train.rollout.in_process.open_batch import Request
from hpc_rlhf.train.server.protocol import ApiError, ChatRequest
from hpc_rlhf.train.server.worker import Worker
from hpc_rlhf.train.text_stream import TextStream

# The longest response if a request sets no length.
MAX_TOKENS = 1024
# Tokens between checks that the client is still connected; one takes longer than a token of a small model.
CHECK_EVERY = 16


@dataclass
class Completion:
    """A response while it is drawn.

    Attributes:
        model: the model's name in requests.
        finish: why it ended, as the API calls it.
        drawn: how many of its tokens have been drawn, EOS included.
    """

    worker: Worker
    request: Request
    text: TextStream
    model: str
    finish: str = "length"
    drawn: int = 0
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it becomes final; some pieces are empty."""
        async with aclosing(self.worker.tokens(self.request)) as tokens:
            async for token in tokens:
                self.drawn += 1
                yield self.text.push(token)
                if self.text.ended or token == self.worker.batch.eos_id:
                    self.finish = "stop"
                    break
        yield self.text.finish()

    @property
    def usage(self) -> dict[str, int]:
        prompt = len(self.request.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.drawn, "total_tokens": prompt + self.drawn}

    def body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An object of the API of this kind, which has at most one choice."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": [{"index": 0, "logprobs": None, **choice} for choice in choices], **more}

    async def whole(self, is_gone: Callable[[], Any]) -> dict[str, Any]:
        """The response as one object. Drawing stops if ``is_gone`` reports that the client has disconnected."""
        pieces = []
        async with aclosing(self.pieces()) as stream:
            async for piece in stream:
                pieces.append(piece)
                if len(pieces) % CHECK_EVERY == 0 and await is_gone():
                    break
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        return self.body("chat.completion", [{"message": message, "finish_reason": self.finish}], usage=self.usage)

    async def events(self, with_usage: bool) -> AsyncGenerator[str, None]:
        """The response as server-sent events."""

        def event(delta: dict[str, str], finish: str | None = None) -> str:
            choices = [{"delta": delta, "finish_reason": finish}]
            return _event(self.body("chat.completion.chunk", choices, **({"usage": None} if with_usage else {})))

        yield event({"role": "assistant", "content": ""})
        try:
            async with aclosing(self.pieces()) as stream:
                async for piece in stream:
                    if piece:
                        yield event({"content": piece})
        except Exception as error:
            yield _event(_unexpected(error).body)
            return
        yield event({}, self.finish)
        if with_usage:
            yield _event(self.body("chat.completion.chunk", [], usage=self.usage))
        yield "data: [DONE]\n\n"


def make_app(
    model: ChatModel, name: str, ready: Callable[[], object], lost: Callable[[HpcRlhfError], object]
) -> FastAPI:
    """The server of a model.

    Args:
        name: of the model in requests.
        ready: called when the server responds.
        lost: as ``Worker`` takes it.
    """
    worker = Worker(model.batch, lost)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        worker.start()
        ready()
        yield
        worker.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "hpc-rlhf"}

    def check_name(asked: str) -> None:
        if asked != name:
            raise ApiError(
                404, f"The model {asked!r} does not exist: this server has {name!r}.", "model", "model_not_found"
            )

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        check_name(asked)
        return card

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Any:
        check_name(body.model)
        request = await asyncio.to_thread(to_request, model, body)  # a long prompt takes seconds
        completion = Completion(worker, request, TextStream(model.tokenizer, body.stops), name)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(completion.events(usage), media_type="text/event-stream")
        return await completion.whole(http.is_disconnected)

    _add_error_handlers(app)
    return app


def to_request(model: ChatModel, body: ChatRequest) -> Request:
    """The request to the model.

    Raises:
        ApiError: the chat template refuses the messages, or they do not fit in the context.
    """
    try:
        prompt = model.prompt([message.turn for message in body.messages])
    except HpcRlhfError as error:
        raise ApiError(400, error.message, "messages", "invalid_value") from error
    asked = body.max_completion_tokens or body.max_tokens
    needed = len(prompt) + (asked or 1)
    if needed > model.context:
        raise ApiError(
            400,
            f"This model's maximum context length is {model.context} tokens. However, you requested {needed} tokens "
            f"({len(prompt)} in the messages, {asked or 1} in the completion). Please reduce the length of the "
            "messages or completion.",
            "messages",
            "context_length_exceeded",
        )
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    seed = secrets.randbits(63) if body.seed is None else body.seed
    return Request(
        prompt, asked or min(MAX_TOKENS, model.context - len(prompt)), sampling_at(temperature, top_p), (seed, "serve")
    )


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _unexpected(error: Exception) -> ApiError:
    if isinstance(error, HpcRlhfError):
        return ApiError(
            503, "The inference engine failed, and the server ends; its log has more.", code="engine_failed"
        )
    return ApiError(500, f"The model failed ({type(error).__name__}); the server's log has more.")


def _add_error_handlers(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(ApiError)
    async def refused(_: HttpRequest, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda each: len(each["loc"]))  # the most precise
        place = list(map(str, first["loc"][1:]))
        if first["type"] == "json_invalid" or not place:
            return answer(ApiError(400, f"The body of the request must be a JSON object: {first['msg']}."))
        # What follows a field's name is a kind of value that it may have, unless it is a list of objects.
        param = f"{place[0]}[{place[1]}].{place[2]}" if place[0] == "messages" and len(place) > 2 else place[0]
        return answer(ApiError(400, f"Invalid {param}: {first['msg']}.", param, "invalid_value"))

    @app.exception_handler(HTTPException)
    async def not_found(http: HttpRequest, error: HTTPException) -> JSONResponse:
        what = "Invalid URL" if error.status_code == 404 else error.detail
        return answer(ApiError(error.status_code, f"{what} ({http.method} {http.url.path})", code="unknown_url"))

    @app.exception_handler(HpcRlhfError)
    async def lost(_: HttpRequest, error: HpcRlhfError) -> JSONResponse:
        return answer(_unexpected(error))

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> JSONResponse:
        response = answer(_unexpected(error))
        # The error goes on to the server, which drops the connection: no client may send its next request on it.
        response.headers["Connection"] = "close"
        return response
