"""What the server measures, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Container
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hpc_rlhf.web.access import App, Receive, Scope, Send

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """The counts and times of one server.

    Args:
        models: the names of the models that it serves.
    """

    def __init__(self, models: list[str]) -> None:
        self.registry = CollectorRegistry()
        of_model: Any = {"labelnames": ["model"], "registry": self.registry, "namespace": "hpc_rlhf"}
        self.requests = Counter(
            "requests", "Requests by path and status.", ["path", "status"], "hpc_rlhf", registry=self.registry
        )
        self.failures = Counter("failed_responses", "Responses that the model failed to finish.", **of_model)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **of_model)
        self.tokens = Counter("generated_tokens", "Tokens drawn; rate() gives tokens per second.", **of_model)
        self.first = Histogram(
            "time_to_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, **of_model
        )
        self.next = Histogram("time_per_token_seconds", "From a token to the next.", buckets=_SECONDS, **of_model)
        self.waiting = Gauge("requests_waiting", "Requests without a token yet.", **of_model)
        self.running = Gauge("requests_running", "Responses of which a part is drawn.", **of_model)
        self.feedback = Counter(
            "feedback", "Votes stored by this server.", ["model", "vote"], "hpc_rlhf", registry=self.registry
        )
        for each in (self.failures, self.prompt_tokens, self.tokens, self.first, self.next, self.waiting, self.running):
            for model in models:
                each.labels(model)  # shown from the beginning

    async def watch(self, model: str, tokens: AsyncGenerator[int, None]) -> AsyncGenerator[int, None]:
        """The tokens of a response, which are counted and timed."""
        state, timed, before = self.waiting.labels(model), self.first.labels(model), time.perf_counter()
        state.inc()
        try:
            async with aclosing(tokens):
                async for token in tokens:
                    now = time.perf_counter()
                    timed.observe(now - before)
                    self.tokens.labels(model).inc()
                    if timed is not self.next.labels(model):
                        state.dec()
                        state, timed = self.running.labels(model), self.next.labels(model)
                        state.inc()
                    before = now
                    yield token
        except Exception:
            self.failures.labels(model).inc()
            raise
        finally:
            state.dec()

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts requests and the status of their responses.

    Args:
        paths: those that are counted by name; the others could be of any number.
    """

    def __init__(self, app: App, metrics: Metrics, paths: Container[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")

        async def counted(message: Scope) -> None:
            if message["type"] == "http.response.start":
                named = path if path in self.paths else "other"
                self.metrics.requests.labels(named, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)
