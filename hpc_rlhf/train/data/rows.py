"""Converts rows of every supported format to one: a prompt and its responses.

The transcript format is DeepSpeed-Chat's: turns of ``Human:`` and ``Assistant:``, each after two newlines. A
prompt ends with ``Assistant:``; a response starts with a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.row_counts import Outcome

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
        chosen, rejected: responses as they follow the transcript, after one space; empty if there is none.
        unpaired: why there is no rejected response although the row has one; None if there is one, or none is given.
        where: the row's file and number, for messages and counts.
    """

    turns: tuple[Turn, ...]
    prompt: str
    chosen: str
    rejected: str = ""
    unpaired: Outcome | None = None
    where: str = field(default="", compare=False)


class Dropped(Exception):
    """A reader leaves a row out of all stages; the outcome says why and is counted."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


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
    """A response that a column holds: it keeps its indentation, but no empty lines around it."""
    kept = re.sub(r"^(\s*\n)+", "", text or "").rstrip()
    kept = re.sub(r"^ (?=\S)", "", kept)  # the space between a prompt and its completion
    return f" {kept}" if kept else ""


def _from_turns(turns: Sequence[Turn], chosen: str) -> Sample:
    """A sample of messages, whose text stays as it is: a template decides what is stripped."""
    kept = tuple((ROLES[role.lower()], text) for role, text in turns)
    return Sample(kept, transcript(turns), _message(chosen))


def _message(text: str) -> str:
    """A response that is a message."""
    return f" {text}" if text.strip() else ""


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
    if chosen is None or row["prompt"] is None:
        raise Dropped(Outcome.NULL)
    turns, prompt = parse_prompt(row["prompt"])
    if system := _system(row):
        turns = (("system", system[0][1].strip()), *turns)
        prompt = f"\n\n{turns[0][1]}{prompt}"
    return _with_rejected(Sample(turns, prompt, _response(chosen)), row, turns, _response(row.get("rejected")))


def _with_rejected(sample: Sample, row: Row, turns: Sequence[Turn] | None, rejected: str) -> Sample:
    """The sample with the row's rejected response, or with why it has none.

    Args:
        turns: of the prompt of the rejected response; None if there is none.
        rejected: the response as a sample has it.
    """
    if "rejected" not in row:
        return sample
    if turns is None or not rejected:
        return replace(sample, unpaired=Outcome.NO_REJECTED)
    if _stripped(turns) != _stripped(sample.turns):
        return replace(sample, unpaired=Outcome.PROMPTS_DIFFER)
    return replace(sample, rejected=rejected)


def _from_hh(row: Row) -> Sample:
    def split(text: str | None) -> tuple[str, str | None]:
        """A transcript's prompt and response; the response is None if the human has the last word."""
        prompt, marker, response = (text or "").rpartition(ASSISTANT)
        return prompt + marker, None if MARKER.search(response) else response.lstrip(" ")

    if row["chosen"] is None:
        raise Dropped(Outcome.NULL)
    prompt, chosen = split(row["chosen"])
    if not prompt:
        raise ValueError("chosen has no Assistant turn")
    if chosen is None:
        raise Dropped(Outcome.USER_LAST)
    rejected_prompt, rejected = split(row.get("rejected"))
    sample = Sample(turns_of(prompt), prompt, _response(chosen))
    return _with_rejected(sample, row, turns_of(rejected_prompt), _response(rejected))


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


def _from_messages(row: Row) -> Sample:
    def split(messages: Any) -> tuple[list[Turn], str]:
        """The turns before the response, and the response."""
        turns = _turns(messages or ())
        if not turns:
            raise Dropped(Outcome.NULL if messages is None else Outcome.EMPTY)
        if ROLES[turns[-1][0].lower()] != "assistant":
            raise Dropped(Outcome.USER_LAST)
        if ROLES[turns[0][0].lower()] == "assistant":  # a continuation of the prompt; otherwise the whole dialogue
            prompt = row.get("prompt") or ()
            turns = [*([("human", prompt)] if isinstance(prompt, str) else _turns(prompt)), *turns]
        if ROLES[turns[0][0].lower()] != "system":
            turns = [*_system(row), *turns]
        if all(ROLES[role.lower()] != "human" for role, _ in turns):
            raise ValueError("no user turn comes before the response")
        return turns[:-1], turns[-1][1]

    column = next((name for name in ("messages", "conversations", "completion") if name in row), "chosen")
    sample = _from_turns(*split(row[column]))
    try:
        turns, rejected = split(row.get("rejected"))
    except Dropped:
        return _with_rejected(sample, row, None, "")
    return _with_rejected(sample, row, turns, _message(rejected))


def _from_instruction(row: Row) -> Sample:
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    turns = _system(row)
    for asked, answered in row.get("history") or ():
        turns += [("human", asked), ("assistant", answered)]
    if row["output"] is None:
        raise Dropped(Outcome.NULL)
    return replace(_from_turns([*turns, ("human", question)], row["output"]), chosen=_response(row["output"]))


def _from_text(row: Row) -> Sample:
    if not (row["text"] or "").strip():
        raise Dropped(Outcome.NULL if row["text"] is None else Outcome.EMPTY)
    return Sample((), "", _response(row["text"])[1:])


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


def read_row(row: Row, format: str, where: str) -> Sample:
    """One row as a sample.

    Args:
        where: the row's file and number.

    Raises:
        Dropped: the row is left out, such as one that does not end with a response.
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
    if not sample.chosen:
        raise Dropped(Outcome.NO_ANSWER)
    return replace(sample, where=where)
