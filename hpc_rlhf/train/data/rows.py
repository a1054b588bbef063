"""Converts rows of every supported format to one: a prompt and its responses.

The transcript format is DeepSpeed-Chat's: turns of ``Human:`` and ``Assistant:``, each after two newlines. A
prompt ends with ``Assistant:``; a response starts with a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_rlhf.errors import HpcRlhfError

ASSISTANT = "\n\nAssistant:"
MARKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "human",
    "human": "human",
    "prompter": "human",
    "assistant": "assistant",
    "gpt": "assistant",
}

Row = Mapping[str, Any]
Turn = tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """A dialogue and its next turn.

    Attributes:
        turns: (role, text) pairs with the roles system, human and assistant; none for plain text.
        prompt: the same as a transcript that ends where the response begins; empty for plain text.
        chosen, rejected: responses as they follow the transcript; empty if there is none.
    """

    turns: tuple[Turn, ...]
    prompt: str
    chosen: str
    rejected: str = ""


def transcript(turns: Sequence[Turn]) -> str:
    """Turns of (role, text) as a prompt for the next response.

    Raises:
        KeyError: unknown role.
    """
    parts = []
    for role, text in turns:
        name, content = ROLES[role.lower()], text.strip()
        parts.append(f"\n\n{content}" if name == "system" else f"\n\n{name.capitalize()}: {content}")
    return "".join(parts) + ASSISTANT


def turns_of(prompt: str) -> tuple[Turn, ...]:
    """The turns of a transcript that is a prompt; text before the first turn is the system's."""
    before, *rest = MARKER.split(prompt.removesuffix(ASSISTANT))
    turns = [(role.lower(), text.strip()) for role, text in zip(rest[::2], rest[1::2], strict=True)]
    return tuple(turn for turn in [("system", before.strip()), *turns] if turn[1]) or (("human", ""),)


def _response(text: str | None) -> str:
    stripped = (text or "").strip()
    return f" {stripped}" if stripped else ""


def _from_turns(turns: Sequence[Turn], chosen: str | None, rejected: str | None = None) -> Sample:
    turns = _stripped(turns)
    return Sample(turns, transcript(turns), _response(chosen), _response(rejected))


def _stripped(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple((ROLES[role.lower()], text.strip()) for role, text in turns)


def _system(row: Row) -> list[Turn]:
    """The turn of a column ``system``, if the row has one."""
    return [("system", row["system"])] if (row.get("system") or "").strip() else []


def parse_prompt(prompt: str) -> tuple[tuple[Turn, ...], str]:
    """The turns and the transcript of a prompt, which is a transcript that ends with ``Assistant:``, or a question."""
    prompt = prompt.rstrip()
    if not prompt.endswith("Assistant:"):
        turns = (("human", prompt.strip()),)
        return turns, transcript(turns)
    if not prompt.startswith("\n\n"):
        prompt = "\n\n" + prompt.lstrip()
    return turns_of(prompt), prompt


def _from_pair(row: Row) -> Sample:
    chosen = row[next((name for name in ("chosen", "completion") if name in row), "response")]
    turns, prompt = parse_prompt(row["prompt"])
    if system := _system(row):
        turns = (("system", system[0][1].strip()), *turns)
        prompt = f"\n\n{turns[0][1]}{prompt}"
    return Sample(turns, prompt, _response(chosen), _response(row.get("rejected")))


def _from_hh(row: Row) -> Sample | None:
    def split(text: str) -> tuple[str, str]:
        """A transcript's prompt and response; the response is empty if the human has the last word."""
        prompt, marker, response = text.rpartition(ASSISTANT)
        return prompt + marker, "" if MARKER.search(response) else response

    prompt, chosen = split(row["chosen"])
    if not prompt:
        raise ValueError("chosen has no Assistant turn")
    rejected_prompt, rejected = split(row.get("rejected") or "")
    turns = turns_of(prompt)
    same = turns_of(rejected_prompt) == turns
    return Sample(turns, prompt, _response(chosen), _response(rejected) if same else "")


def _turns(messages: Any) -> list[Turn]:
    """The turns of a list of messages in OpenAI's form (role, content) or ShareGPT's (from, value), or of its JSON.

    Raises:
        ValueError: a message calls a tool, is a tool's reply, or is not text.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError:
            raise ValueError("a list of messages was expected, or its JSON") from None
    turns = []
    for message in messages:
        role = message["role"] if "role" in message else message["from"]
        content = message["content"] if "role" in message else message["value"]
        if message.get("tool_calls") or role.lower() in ("tool", "function", "observation", "function_call"):
            raise ValueError(f"turns of tools are not supported (role {role})")
        if not isinstance(content, str):  # a list of parts
            others = [part["type"] for part in content if part["type"] != "text"]
            if others:
                raise ValueError(f"content of type {others[0]} is not supported")
            content = "".join(part["text"] for part in content)
        if role.lower() not in ROLES:
            raise KeyError(role)
        turns.append((role, content))
    return turns


def _from_messages(row: Row) -> Sample | None:
    def split(messages: Any) -> tuple[list[Turn], str] | None:
        """The turns before the response, and the response; None if there is none."""
        turns = _turns(messages or ())
        if not turns or ROLES[turns[-1][0].lower()] != "assistant":
            return None
        if ROLES[turns[0][0].lower()] == "assistant":  # a continuation of the prompt; otherwise the whole dialogue
            prompt = row.get("prompt") or ()
            turns = [*([("human", prompt)] if isinstance(prompt, str) else _turns(prompt)), *turns]
        if ROLES[turns[0][0].lower()] != "system":
            turns = [*_system(row), *turns]
        if all(ROLES[role.lower()] != "human" for role, _ in turns):
            raise ValueError("no user turn comes before the response")
        return turns[:-1], turns[-1][1]

    column = next((name for name in ("messages", "conversations", "completion") if name in row), "chosen")
    chosen, rejected = split(row[column]), split(row.get("rejected"))
    if chosen is None:
        return None
    same = rejected is not None and _stripped(rejected[0]) == _stripped(chosen[0])
    return _from_turns(*chosen, rejected[1] if rejected is not None and same else None)


def _from_instruction(row: Row) -> Sample:
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    turns = _system(row)
    for asked, answered in row.get("history") or ():
        turns += [("human", asked), ("assistant", answered)]
    return _from_turns([*turns, ("human", question)], row["output"])


def _from_text(row: Row) -> Sample:
    return Sample((), "", row["text"].strip())


def _misfit(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing, or is an unknown role"
    return str(error) if isinstance(error, ValueError) else f"text was expected ({error})"


READERS = {
    "prompt-chosen-rejected": _from_pair,
    "hh": _from_hh,
    "messages": _from_messages,
    "instruction": _from_instruction,
    "text": _from_text,
}


def read_row(row: Row, format: str, where: str) -> Sample | None:
    """One row as a sample; None if it does not end with a response.

    Raises:
        HpcRlhfError: the row does not have what its format needs.
    """
    try:
        sample = READERS[format](row)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise HpcRlhfError(
            f"the row does not fit the format {format}: {_misfit(error)}; its columns are {', '.join(sorted(row))}",
            where=where,
            hint="fix the row, or choose a format that fits: " + ", ".join(READERS),
        ) from error
    return sample if sample is not None and sample.chosen else None
