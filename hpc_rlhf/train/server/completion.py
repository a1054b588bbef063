"""A chat completion: the request to the model, and its response as OpenAI's objects and events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.chat import ChatModel, sampling_at
from hpc_rlhf.train.rollout.in_process.open_batch import Request
from hpc_rlhf.train.server.metrics import Metrics
from hpc_rlhf.train.server.protocol import ChatRequest
from hpc_rlhf.train.server.worker import Worker
from hpc_rlhf.train.text_stream import TextStream
from hpc_rlhf.web.api_error import ApiError

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
    metrics: Metrics
    finish: str = "length"
    drawn: int = 0
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it becomes final; some pieces are empty."""
        self.metrics.prompt_tokens.labels(self.model).inc(len(self.request.prompt))
        async with aclosing(self.metrics.watch(self.model, self.worker.tokens(self.request))) as tokens:
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
            yield _event(unexpected(error).body)
            return
        yield event({}, self.finish)
        if with_usage:
            yield _event(self.body("chat.completion.chunk", [], usage=self.usage))
        yield "data: [DONE]\n\n"


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


def unexpected(error: Exception) -> ApiError:
    """What clients learn of an error that is not theirs."""
    if isinstance(error, HpcRlhfError):
        return ApiError(
            503, "The inference engine failed, and the server ends; its log has more.", code="engine_failed"
        )
    return ApiError(500, f"The model failed ({type(error).__name__}); the server's log has more.")
