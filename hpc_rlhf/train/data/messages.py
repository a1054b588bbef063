"""Lists of messages in OpenAI's form (role, content) or ShareGPT's (from, value) as turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_rlhf.run.row_counts import Outcome
from hpc_rlhf.train.data.cells import as_list, as_text
from hpc_rlhf.train.data.rows import ROLES, Turn

_TOOLS = frozenset({
    "tool", "function", "observation", "function_call", "function_response", "tool_call", "tool_response", "ipython",
})  # fmt: skip
_THINKING = ("reasoning_content", "reasoning", "thinking")


class Dropped(Exception):
    """A reader leaves a row out of all stages; the outcome says why and is counted."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


def turns_of_messages(messages: Any) -> list[Turn]:
    """The turns of a list of messages, or of its JSON. Thinking that a message keeps apart comes before its content.

    Raises:
        Dropped: a message's content is null.
        ValueError: a message has an unknown role, calls a tool, is a tool's reply, or is not text.
    """
    listed = as_list(messages, "messages")
    if not all(isinstance(message, Mapping) for message in listed):
        raise ValueError("a list of messages was expected, or its JSON")
    if listed and listed[-1].get("weight") == 0:
        raise ValueError("a response of weight 0, which is not to be learned, is not supported")
    turns = []
    for message in listed:
        role, content = ("role", "content") if "role" in message else ("from", "value")
        name = message[role].lower()
        if message.get("tool_calls") or message.get("function_call") or name in _TOOLS:
            raise ValueError(f"turns of tools are not supported (role {name})")
        if name not in ROLES:
            raise ValueError(f"unknown role {name}")
        turns.append((ROLES[name], _with_thinking(message, _text(message[content]))))
    return turns


def prompt_turns(prompt: Any) -> list[Turn]:
    """The turns of a prompt, which is a list of messages, its JSON, or the user's text."""
    if isinstance(prompt, str):
        try:
            if not all(isinstance(message, dict) for message in as_list(prompt, "messages")):
                return [("human", prompt)]
        except ValueError:
            return [("human", prompt)]
    return turns_of_messages(prompt)


def _text(content: Any) -> str:
    """The text of a message, which may be in parts."""
    if isinstance(content, list):
        others = [part["type"] for part in content if part["type"] != "text"]
        if others:
            raise ValueError(f"content of type {others[0]} is not supported")
        content = "".join(part["text"] for part in content)
    content = as_text(content)
    if content is None:
        raise Dropped(Outcome.NULL)
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is not text but of type {type(content).__name__}")
    return content


def _with_thinking(message: Mapping[str, Any], content: str) -> str:
    """A message's content after its thinking, which may be kept apart: as templates that know both forms write it."""
    name = next((name for name in _THINKING if message.get(name)), None)
    if name is None:
        return content
    thinking = message[name]
    if not isinstance(thinking, str) or "</think>" in content:
        raise ValueError(f"{name} is not text, or the content holds thinking too")
    return "<think>\n{}\n</think>\n\n{}".format(thinking.strip("\n"), content.lstrip("\n"))
