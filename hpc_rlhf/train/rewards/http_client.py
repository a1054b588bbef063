"""Asks a server for rewards, in a process without torch that can be killed when the server hangs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import BaseHandler, HTTPRedirectHandler, Request, build_opener

# Seconds before each retry, unless the server asks for others.
PAUSES = (1.0, 2.0, 4.0, 8.0)
LONGEST_PAUSE = 60.0
_LARGEST_ANSWER = 2**26


class _NoRedirect(HTTPRedirectHandler):
    """The bearer token must not go to another server."""

    def redirect_request(self, *args: Any) -> None:
        return None


def make(url: str, secret: str | None, timeout: float) -> Callable[[dict[str, Any]], list[float | None] | str]:
    """Make a function that posts a batch and returns its rewards, or why there are none, as ``Failure.why``.

    Args:
        secret: the environment variable with the bearer token.
        timeout: seconds per try.
    """
    redirect: BaseHandler = _NoRedirect()
    opener = build_opener(redirect)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if secret is not None:
        headers["Authorization"] = f"Bearer {os.environ[secret]}"

    def ask(batch: dict[str, Any]) -> list[float | None] | str:
        request = Request(url, json.dumps(batch).encode(), headers, method="POST")
        for pause in (*PAUSES, None):
            try:
                with opener.open(request, timeout=timeout) as answer:
                    return _rewards(answer.read(_LARGEST_ANSWER), len(batch["responses"]))
            except HTTPError as error:
                why = f"the server answered {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 425, 429):
                    return why
                wished = error.headers.get("Retry-After", "")
                pause = min(float(wished), LONGEST_PAUSE) if pause and wished.isdecimal() else pause
            except (OSError, HTTPException) as error:
                why = f"the server cannot be reached: {error}"
            if pause is not None:
                time.sleep(pause)
        return f"{why}, in {len(PAUSES) + 1} tries"

    return ask


def _rewards(answer: bytes, count: int) -> list[float | None] | str:
    try:
        rewards = json.loads(answer)["rewards"]
    except (ValueError, KeyError, TypeError):
        return f"the server's answer is not an object with rewards: {answer[:100]!r}"
    numbers = isinstance(rewards, list) and all(isinstance(each, float | int | None) for each in rewards)
    if not numbers or len(rewards) != count:
        return f"the server did not return a list of {count} numbers: {answer[:100]!r}"
    try:
        return [None if each is None else float(each) for each in rewards]
    except OverflowError:
        return f"the server returned a number that is too large: {answer[:100]!r}"
