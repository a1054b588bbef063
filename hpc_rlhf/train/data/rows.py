"""Rows of every supported format, brought to one: a prompt and its answers.

The transcript format is DeepSpeed-Chat's: turns of ``Human:`` and ``Assistant:``, two newlines before
each. A prompt ends with ``Assistant:``; an answer starts with a space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError

ASSISTANT = "\n\nAssistant:"
ROLE_NAMES = {
    "user": "Human",
    "human": "Human",
    "prompter": "Human",
    "assistant": "Assistant",
    "gpt": "Assistant",
}

Row = Mapping[str, Any]
Sample = dict[str, str | None]


def transcript(turns: list[tuple[str, str]]) -> str:
    """Turns of (role, text) as a prompt that asks for the next answer.

    Raises:
        KeyError: a role that is neither a person's, the assistant's nor the system's.
    """
    parts = []
    for role, text in turns:
        if role == "system":
            parts.append(f"\n\n{text.strip()}")
        else:
            parts.append(f"\n\n{ROLE_NAMES[role.lower()]}: {text.strip()}")
    return "".join(parts) + ASSISTANT


def _answer(text: str | None) -> str | None:
    stripped = (text or "").strip()
    return f" {stripped}" if stripped else None


def _from_pair(row: Row) -> Sample:
    prompt = row["prompt"].rstrip()
    if not prompt.endswith("Assistant:"):
        prompt = transcript([("human", prompt)])
    elif not prompt.startswith("\n\n"):
        prompt = "\n\n" + prompt.lstrip()
    return {
        "prompt": prompt,
        "chosen": _answer(row["chosen"] if "chosen" in row else row["response"]),
        "rejected": _answer(row.get("rejected")),
    }


def _from_hh(row: Row) -> Sample:
    chosen_prompt, found, chosen = row["chosen"].rpartition(ASSISTANT)
    if not found:
        raise ValueError("chosen has no turn of the Assistant")
    rejected_prompt, _, rejected = (row.get("rejected") or "").rpartition(ASSISTANT)
    same = chosen_prompt == rejected_prompt
    return {
        "prompt": chosen_prompt + ASSISTANT,
        "chosen": _answer(chosen),
        "rejected": _answer(rejected) if same else None,
    }


def _from_messages(row: Row) -> Sample:
    def split(messages: list[dict[str, str]] | None) -> tuple[str | None, str | None]:
        if not messages or ROLE_NAMES.get(messages[-1]["role"].lower()) != "Assistant":
            return None, None
        turns = [(message["role"], message["content"]) for message in messages[:-1]]
        return transcript(turns), messages[-1]["content"]

    prompt, chosen = split(row["messages"] if "messages" in row else row["chosen"])
    rejected_prompt, rejected = split(row.get("rejected"))
    return {
        "prompt": prompt,
        "chosen": _answer(chosen),
        "rejected": _answer(rejected) if rejected_prompt == prompt else None,
    }


def _from_instruction(row: Row) -> Sample:
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return {"prompt": transcript([("human", question)]), "chosen": _answer(row["output"]), "rejected": None}


def _from_text(row: Row) -> Sample:
    return {"prompt": "", "chosen": row["text"].strip() or None, "rejected": None}


READERS = {
    "prompt-chosen-rejected": _from_pair,
    "hh": _from_hh,
    "messages": _from_messages,
    "instruction": _from_instruction,
    "text": _from_text,
}


def read_row(row: Row, format: str, where: str) -> Sample:
    """One row as a sample: the prompt (empty for plain text), the chosen and the rejected answer, or None.

    Raises:
        HpcRlhfError: the row does not have what its format needs.
    """
    try:
        return READERS[format](row)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise HpcRlhfError(
            f"a row does not fit the format {format} ({type(error).__name__}: {error}); it has {sorted(row)}",
            where=where,
            hint="choose the format that fits these columns: " + ", ".join(READERS),
            exit_code=RUN_FAILED,
        ) from error
