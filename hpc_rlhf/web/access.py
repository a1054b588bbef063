"""Admits only clients that have the server's token.

Every user of this machine can reach its ports, and so can, by DNS rebinding, every web page in a browser on it.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from hpc_rlhf.web.api_error import ApiError

# The paths that need no token: they tell nothing of the model. The page asks for the token.
OPEN = ("/health", "/")
# Bytes of the longest body of a request: ten times the text of a context of 128k tokens.
MAX_BODY = 8 << 20
# Bytes that the bodies of all requests in progress may have together, besides small ones.
MAX_BODIES, SMALL = 256 << 20, 64 << 10

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware that refuses requests without the token, or with a Host other than this machine.

    Args:
        host: the address that the server listens on.
    """

    def __init__(self, app: App, token: str, host: str) -> None:
        self.app = app
        self.in_progress = 0  # bytes of the bodies of requests
        self.credentials = f"Bearer {token}".encode()
        self.names = {"localhost", host.lower()}
        if host in ("0.0.0.0", "::"):  # every address of this machine
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.objection(scope) if scope["type"] in ("http", "websocket") else None
        if error is None:
            length = _body_length(dict(scope.get("headers", ())))
            self.in_progress += length
            try:
                await self.app(scope, receive, send)
            finally:
                self.in_progress -= length
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": error.message})
        else:
            headers = [(b"content-type", b"application/json")]
            headers += [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
            await send({"type": "http.response.start", "status": error.status, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})

    def objection(self, scope: Scope) -> ApiError | None:
        """Why a request is refused, if it is."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_ours(host):
            return ApiError(403, f"This server does not answer to the host {host!r}.", code="invalid_host")
        if scope["path"] in OPEN:
            return None
        if not hmac.compare_digest(headers.get(b"authorization", b""), self.credentials):
            return ApiError(401, "Give the token that the server printed, as the API key.", code="invalid_api_key")
        if b"transfer-encoding" in headers:
            return ApiError(411, "Send the body with a Content-Length.", code="length_required")
        length = _body_length(headers)
        if length > MAX_BODY:
            return ApiError(413, f"The body is longer than {MAX_BODY} bytes.", code="request_too_large")
        if length > SMALL and self.in_progress + length > MAX_BODIES:
            return ApiError(503, "There are too many long requests; try again later.", code="overloaded")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header is a name of this machine or any address: rebinding needs a name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True


def _body_length(headers: Mapping[bytes, bytes]) -> int:
    return int(headers.get(b"content-length", b"0"))
