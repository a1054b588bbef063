"""What a row of any format becomes: a prompt and its responses.

The transcript format is DeepSpeed-Chat's: turns of ``Human:`` and ``Assistant:``, each after two newlines. A
prompt ends with ``Assistant:``; a response starts with a space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

Turn = tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """A dialogue and its next turn.

    Attributes:
        turns: (role, text) pairs with the roles system, human and assistant; none for plain text.
        prompt: the same as a transcript that ends where the response begins; empty for plain text.
        chosen, rejected: responses as they follow the transcript, after one space; empty if there is none. A single
            response that its label calls bad is rejected.
        unanswered: why there is no chosen response; None if there is one.
        unpaired: why there is no rejected response although the row has one; None if there is one, or none is given.
        margin: by how much the chosen response is better; None if the row has no such number.
        labeled: a label says whether the single response is good.
        where: the row's file and number, for messages and counts.
        further: the row's further columns, for rewards.
    """

    turns: tuple[Turn, ...]
    prompt: str
    chosen: str
    rejected: str = ""
    unanswered: Outcome | None = None
    unpaired: Outcome | None = None
    margin: float | None = None
    labeled: bool = False
    where: str = field(default="", compare=False)
    further: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def text(self) -> str:
        """All that was read."""
        return "\n".join([self.prompt, *(text for _, text in self.turns), self.chosen, self.rejected])


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


def parse_prompt(prompt: str) -> tuple[tuple[Turn, ...], str]:
    """The turns and the transcript of a prompt, which is a transcript that ends with ``Assistant:``, or a question."""
    prompt = prompt.rstrip()
    if not prompt.endswith("Assistant:"):
        turns = (("human", prompt.strip()),)
        return turns, transcript(turns)
    if not prompt.startswith("\n\n"):
        prompt = "\n\n" + prompt.lstrip()
    return turns_of(prompt), prompt
