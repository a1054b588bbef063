"""What a request for a chat completion may contain. Fields that would change the response but are not implemented are
refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from hpc_rlhf.web.api_error import ApiError

ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "assistant"}
# Unsupported fields are accepted with these values, which do not change the response, and with null.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "response_format": ({"type": "text"},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "modalities": (["text"],),
    "tools": ([],), "tool_calls": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "parallel_tool_calls": (True, False), "annotations": ([],),
    "store": (False,), "service_tier": ("auto", "default"), "type": ("text", "message"),
}  # fmt: skip
# Fields that never change the response.
IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "name"})


class _Object(BaseModel):
    """An object in a request. Any field that would be ignored although it matters is refused."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _refuse_others(self) -> _Object:
        for name, value in (self.model_extra or {}).items():
            known = NEUTRAL.get(name)
            if value is None or name in IGNORED or (known and any(_same(value, it) for it in known)):
                continue
            if known is None:
                raise ApiError(400, f"Unrecognized request argument: {name}", name, "unknown_parameter")
            raise ApiError(400, f"This server does not support this value of {name}.", name, "unsupported_value")
        return self


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _check_unicode(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text has half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
_Stop = Annotated[Text, StringConstraints(min_length=1)]
_Length = Annotated[int, Field(ge=1)]


class _TextPart(_Object):
    type: Literal["text"]
    text: Text


class Message(_Object):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[_TextPart]

    @property
    def turn(self) -> tuple[str, str]:
        """The message as ``Renderer`` takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ROLES[self.role], text


class _StreamOptions(_Object):
    include_usage: bool = False


class ChatRequest(_Object):
    """The body of a request for a chat completion."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Length | None = None
    max_tokens: _Length | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @model_validator(mode="after")
    def _check_last_turn(self) -> ChatRequest:
        if self.messages[-1].role == "assistant":
            raise ApiError(400, "The last message must not be the assistant's.", "messages", "invalid_value")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the response."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
