"""The dashboard's server: its page, the runs, and the details of chosen runs. It only reads."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from starlette.middleware.gzip import GZipMiddleware

from hpc_rlhf import __version__
from hpc_rlhf.observe.dashboard import page
from hpc_rlhf.observe.dashboard.board import Board, chosen
from hpc_rlhf.observe.dashboard.details import Details
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.observe.report.comparison import MAX_RUNS
from hpc_rlhf.web.access import App, Guard
from hpc_rlhf.web.listening import LOCALHOST, listen


def serve(folder: Path, port: int, token: str, ready: Callable[[], object]) -> None:
    """Serve the dashboard of a folder on this machine's loopback until a signal ends it.

    Args:
        token: what clients must give.
        ready: called when the server listens.

    Raises:
        HpcRlhfError: the port cannot be used.
    """
    with listen(LOCALHOST, port) as listener:
        ready()
        config = uvicorn.Config(
            make_app(Board(folder), token), log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        uvicorn.Server(config).run(sockets=[listener])


def make_app(board: Board, token: str) -> App:
    """The server of a board for clients with a token."""
    app, details = FastAPI(openapi_url=None), Details(board)
    app.add_middleware(GZipMiddleware)

    @app.get("/")
    def show_page() -> Response:
        return Response(page.HTML, media_type="text/html", headers=page.HEADERS)

    @app.get("/runs")
    def runs(request: Request) -> Response:
        rows, left_out = board.rows()
        facts = {"folder": str(board.folder), "most": MAX_RUNS, "version": __version__, "left_out": left_out}
        return _reply(request, {**facts, "runs": [row.to_dict() for row in rows]})

    @app.get("/details")
    def describe(request: Request, run: Annotated[list[str], Query()]) -> Response:
        return _reply(request, details.describe(chosen(board.rows()[0], run)[:MAX_RUNS]))

    return Guard(app, token, LOCALHOST)


def _reply(request: Request, facts: object) -> Response:
    """The facts as JSON, or only that they have not changed since the client asked last."""
    body = json.dumps(_clean(facts), ensure_ascii=False).encode("utf-8", "backslashreplace")
    headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _clean(value: object) -> object:
    """What JSON can hold and a page can show, for values that come from files."""
    if isinstance(value, dict):
        return {printable(str(key)): _clean(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return printable(value) if isinstance(value, str) else value
