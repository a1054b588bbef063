"""Converts rows of every supported format to one: a prompt and its responses.

The transcript format is DeepSpeed-Chat's: turns of ``Human:`` and ``Assistant:``, each after two newlines. A
prompt ends with ``Assistant:``; a response starts with a space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_rlhf.errors import HpcRlhfError

ASSISTANT = "\n\nAssistant:"
MARKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {
    "system": "system",
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
    turns = tuple((ROLES[role.lower()], text.strip()) for role, text in turns)
    return Sample(turns, transcript(turns), _response(chosen), _response(rejected))


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
    chosen = row["chosen"] if "chosen" in row else row["response"]
    return Sample(*parse_prompt(row["prompt"]), _response(chosen), _response(row.get("rejected")))


def _from_hh(row: Row) -> Sample:
    chosen_prompt, marker, chosen = row["chosen"].rpartition(ASSISTANT)
    if not marker:
        raise ValueError("chosen has no Assistant turn")
    rejected_prompt, _, rejected = (row.get("rejected") or "").rpartition(ASSISTANT)
    same = chosen_prompt == rejected_prompt
    prompt = chosen_prompt + ASSISTANT
    return Sample(turns_of(prompt), prompt, _response(chosen), _response(rejected) if same else "")


def _from_messages(row: Row) -> Sample | None:
    def split(messages: list[dict[str, str]] | None) -> tuple[list[Turn] | None, str | None]:
        if not messages or ROLES.get(messages[-1]["role"].lower()) != "assistant":
            return None, None
        return [(message["role"], message["content"]) for message in messages[:-1]], messages[-1]["content"]

    turns, chosen = split(row["messages"] if "messages" in row else row["chosen"])
    rejected_turns, rejected = split(row.get("rejected"))
    if turns is None:
        return None
    return _from_turns(turns, chosen, rejected if rejected_turns == turns else None)


def _from_instruction(row: Row) -> Sample:
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return _from_turns([("human", question)], row["output"])


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
