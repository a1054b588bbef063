"""The endpoints of the server, and its errors in the shape of OpenAI's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.chat import ChatModel
from hpc_rlhf.train.server import page
from hpc_rlhf.train.server.completion import MAX_TOKENS, Completion, to_request, unexpected
from hpc_rlhf.train.server.metrics import Counted, Metrics
from hpc_rlhf.train.server.protocol import ChatRequest
from hpc_rlhf.train.server.voting import Ballot, Voting
from hpc_rlhf.train.server.worker import Worker
from hpc_rlhf.train.text_stream import TextStream
from hpc_rlhf.web.access import App, Guard
from hpc_rlhf.web.api_error import ApiError


def make_server(
    models: Mapping[str, ChatModel],
    compared: Sequence[str],
    voting: Voting | None,
    token: str,
    host: str,
    ready: Callable[[], object],
    lost: Callable[[HpcRlhfError], object],
) -> App:
    """The server of one model or two.

    Args:
        models: by their names in requests.
        compared: two of the names, perhaps the same, that the page compares; empty if it compares none.
        voting: where votes go; None if they are not stored.
        token: what clients must give.
        host: the address that the server listens on.
        ready: called when the server responds.
        lost: as ``Worker`` takes it.
    """
    metrics = Metrics(list(models))
    app = _make_app(models, compared, voting, metrics, ready, lost)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    return Counted(Guard(app, token, host), metrics, paths)


def _make_app(
    models: Mapping[str, ChatModel],
    compared: Sequence[str],
    voting: Voting | None,
    metrics: Metrics,
    ready: Callable[[], object],
    lost: Callable[[HpcRlhfError], object],
) -> FastAPI:
    workers = {name: Worker(model.batch, lost) for name, model in models.items()}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        for worker in workers.values():
            worker.start()
        ready()
        yield
        for worker in workers.values():
            worker.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "hpc-rlhf"}

    def check_name(asked: str, param: str = "model") -> None:
        if asked not in models:
            has = " and ".join(map(repr, models))
            raise ApiError(404, f"The model {asked!r} does not exist: this server has {has}.", param, "model_not_found")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in models]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        check_name(asked)
        return card(asked)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Any:
        check_name(body.model)
        model = models[body.model]
        request = await asyncio.to_thread(to_request, model, body)  # a long prompt takes seconds
        text = TextStream(model.tokenizer, body.stops)
        completion = Completion(workers[body.model], request, text, body.model, metrics)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(completion.events(usage), media_type="text/event-stream")
        return await completion.whole(http.is_disconnected)

    @app.get("/")
    async def show_page() -> Response:
        return Response(page.HTML, media_type="text/html", headers=page.HEADERS)

    @app.get("/page/settings")
    async def settings() -> dict[str, Any]:
        """What the page needs to know of this server."""
        return {
            "models": list(models),
            "compared": list(compared),
            "max_tokens": {name: min(MAX_TOKENS, model.context // 2) for name, model in models.items()},
            "stores_votes": voting is not None,
            "records_user": voting is not None and voting.record_user,
        }

    @app.post("/v1/feedback")
    async def vote(body: Ballot) -> dict[str, str]:
        if voting is None:
            raise ApiError(403, "This server stores no votes, because the run is not its user's.", code="no_feedback")
        for name in body.models:
            check_name(name, "models")
        stored = await asyncio.to_thread(voting.store, body)
        for name, result in body.results:
            metrics.feedback.labels(name, result).inc()
        return {"id": stored.id, "object": "feedback"}

    _add_error_handlers(app)
    return app


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
        return answer(unexpected(error))

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> JSONResponse:
        response = answer(unexpected(error))
        # The error goes on to the server, which drops the connection: no client may send its next request on it.
        response.headers["Connection"] = "close"
        return response
