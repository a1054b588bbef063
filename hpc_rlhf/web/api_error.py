"""An error that a client of a server gets."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error in the shape in which the OpenAI API reports it.

    Args:
        param: the field of the request that is wrong.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The body of the HTTP response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
