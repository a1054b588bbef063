"""Reads rows of every supported format as samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from hpc_rlhf.spec.source import CELLS
from hpc_rlhf.train.data.cells import PROMPTS, RESPONSES, Cells, as_list, as_text
from hpc_rlhf.train.data.messages import Dropped, prompt_turns, turns_of_messages
from hpc_rlhf.train.data.rows import ASSISTANT, MARKER, Sample, Turn, parse_prompt, transcript, turns_of


def _response(text: str | None) -> str:
    """A response that a column holds: it keeps its indentation, but no empty lines around it."""
    kept = re.sub(r"^(\s*\n)+", "", text or "").rstrip()
    kept = re.sub(r"^ (?=\S)", "", kept)  # the space between a prompt and its completion
    return f" {kept}" if kept else ""


def _from_turns(turns: Sequence[Turn], chosen: str) -> Sample:
    """A sample of messages, whose text stays as it is: a template decides what is stripped."""
    return Sample(tuple(turns), transcript(turns), _message(chosen))


def _message(text: str) -> str:
    """A response that is a message."""
    return f" {text}" if text.strip() else ""


def _stripped(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple((role, text.strip()) for role, text in turns)


def _system(row: Cells) -> list[Turn]:
    """The turn of a column ``system``, if the row has one."""
    system = (row.text("system") if "system" in row else None) or ""
    return [("system", system)] if system.strip() else []


def _prompt_only(turns: Sequence[Turn]) -> Sample:
    """A sample without a response."""
    if not any(text.strip() for role, text in turns if role != "system"):
        raise Dropped(Outcome.EMPTY)
    if turns[-1][0] != "human":
        raise ValueError("the prompt does not end with the user's turn")
    return Sample(tuple(turns), transcript(turns), "", unanswered=Outcome.PROMPT_ONLY)


def _from_pair(row: Cells) -> Sample:
    if "chosen" in row and row.lacks(PROMPTS, "prompt"):
        return _from_pair_alone(row)
    given = row.text("prompt")
    if row.lacks(RESPONSES, "chosen", "completion", "response"):
        if given is None:
            raise Dropped(Outcome.NULL)
        return _prompt_only([*_system(row), *parse_prompt(given)[0]])
    chosen = row.text(row.first("chosen", "completion", "response"))
    if chosen is None or given is None:
        raise Dropped(Outcome.NULL)
    turns, prompt = parse_prompt(given)
    if system := _system(row):
        turns = (("system", system[0][1].strip()), *turns)
        prompt = f"\n\n{turns[0][1]}{prompt}"
    rejected = _response(row.text("rejected")) if "rejected" in row else ""
    return _with_rejected(Sample(turns, prompt, _response(chosen)), row, turns, rejected)


def _from_pair_alone(row: Cells) -> Sample:
    """A pair without a column for its prompt: its responses are transcripts, or begin with the prompt (TRL)."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen is None or rejected is None:
        raise Dropped(Outcome.NULL)
    if ASSISTANT in chosen and MARKER.search(f"\n\n{chosen.lstrip()}"):
        return _from_hh(row)
    unlike = (n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    size = next(unlike, min(len(chosen), len(rejected)))
    if not all(text[size : size + 1].strip() == "" for text in (chosen, rejected)):
        size = len(re.sub(r"\s*\S*$", "", chosen[:size]))  # the responses begin with a whole word
    if not all(part.strip() for part in (chosen[:size], chosen[size:], rejected[size:])):
        raise Dropped(Outcome.NO_COMMON_PROMPT)
    if other := row.ignored(chosen + rejected):
        raise ValueError(f"it has no prompt, but text in {other[0]}, which is not read")
    turns, prompt = parse_prompt(chosen[:size])
    return _with_rejected(Sample(turns, prompt, _response(chosen[size:])), row, turns, _response(rejected[size:]))


def _with_rejected(sample: Sample, row: Cells, turns: Sequence[Turn] | None, rejected: str) -> Sample:
    """The sample with the row's rejected response, or with why it has none.

    Args:
        turns: of the prompt of the rejected response; None if there is none.
        rejected: the response as a sample has it.
    """
    if "rejected" not in row:
        return _labeled(sample, row)
    sample = replace(sample, margin=row.number("margin"))
    if turns is None or not rejected:
        return replace(sample, unpaired=Outcome.NO_REJECTED)
    if _stripped(turns) != _stripped(sample.turns):
        return replace(sample, unpaired=Outcome.PROMPTS_DIFFER)
    return replace(sample, rejected=rejected)


def _labeled(sample: Sample, row: Cells) -> Sample:
    """A sample with a single response, which is rejected if its label says that it is bad (TRL's unpaired
    preferences)."""
    label = row.get("label")
    if isinstance(label, str):
        label = {"true": 1, "false": 0}.get(label.strip().lower(), row.number("label"))
    if not isinstance(label, (int, float)) or label != label:
        return sample
    if label not in (0, 1):
        raise ValueError(f"label is {label}, and true or false was expected: whether the response is good")
    return _with_label(sample, bool(label)) if sample.chosen else sample


def _with_label(sample: Sample, is_good: bool) -> Sample:
    """A sample with a single response, which a label calls good or bad."""
    if is_good:
        return replace(sample, labeled=True)
    return replace(sample, chosen="", rejected=sample.chosen, unanswered=Outcome.BAD_ANSWER, labeled=True)


def _from_hh(row: Cells) -> Sample:
    def split(text: str | None) -> tuple[str, str | None]:
        """A transcript's prompt and response; the response is None if the human has the last word."""
        text = text or ""
        if text.lstrip().startswith("Human:"):
            text = f"\n\n{text.lstrip()}"
        prompt, marker, response = text.rpartition(ASSISTANT)
        return prompt + marker, None if MARKER.search(response) else response.lstrip(" ")

    given = row.text("chosen")
    if given is None:
        raise Dropped(Outcome.NULL)
    prompt, chosen = split(given)
    if not prompt:
        raise ValueError("chosen has no Assistant turn")
    if chosen is None:
        raise Dropped(Outcome.USER_LAST)
    rejected_prompt, rejected = split(row.text("rejected") if "rejected" in row else None)
    sample = Sample(turns_of(prompt), prompt, _response(chosen))
    return _with_rejected(sample, row, turns_of(rejected_prompt), _response(rejected))


def _from_messages(row: Cells) -> Sample:
    def split(messages: Any) -> tuple[list[Turn], str]:
        """The turns before the response, and the response."""
        turns = turns_of_messages(messages or [])
        if not turns:
            raise Dropped(Outcome.NULL if messages is None else Outcome.EMPTY)
        if turns[-1][0] != "assistant":
            raise Dropped(Outcome.USER_LAST)
        if turns[0][0] == "assistant":  # a continuation of the prompt; otherwise the whole dialogue
            turns = [*prompt_turns(row.get("prompt") or []), *turns]
        if turns[0][0] != "system":
            turns = [*_system(row), *turns]
        if all(role != "human" for role, _ in turns):
            raise ValueError("no user turn comes before the response")
        return turns[:-1], turns[-1][1]

    if "prompt" in row and row.lacks(RESPONSES, "messages", "conversations", "completion", "chosen"):
        if row["prompt"] is None:
            raise Dropped(Outcome.NULL)
        turns = prompt_turns(row["prompt"])
        return _prompt_only(turns if turns and turns[0][0] == "system" else [*_system(row), *turns])
    pair = ("chosen",) if "rejected" in row and "chosen" in row else ()
    column = row.first(*pair, "messages", "conversations", "completion", "chosen")
    sample = _from_turns(*split(row[column]))
    try:
        turns, rejected = split(row.get("rejected"))
    except Dropped:
        return _with_rejected(sample, row, None, "")
    return _with_rejected(sample, row, turns, _message(rejected))


def _from_instruction(row: Cells) -> Sample:
    given = [row.text("instruction"), row.text("input") if "input" in row else None]
    question = "\n".join(part for part in given if part)
    turns = _system(row)
    for asked, answered in as_list(row.get("history") or [], "pairs of texts"):
        turns += [("human", as_text(asked)), ("assistant", as_text(answered))]
    turns.append(("human", question))
    if row.lacks(RESPONSES, "output"):
        return _prompt_only(turns)
    answer = row.text("output")
    if answer is None:
        raise Dropped(Outcome.NULL)
    return replace(_from_turns(turns, answer), chosen=_response(answer))


def _from_text(row: Cells) -> Sample:
    text = row.text("text")
    if not (text or "").strip():
        raise Dropped(Outcome.NULL if text is None else Outcome.EMPTY)
    return Sample((), "", _response(text)[1:])


def _from_prompt(row: Cells) -> Sample:
    prompt = as_text(row["prompt"])
    if prompt is None:
        raise Dropped(Outcome.NULL)
    turns = prompt_turns(prompt)
    if turns == [("human", prompt)]:
        turns = list(parse_prompt(prompt)[0])
    return _prompt_only(turns if turns and turns[0][0] == "system" else [*_system(row), *turns])


def _from_vote(row: Cells) -> Sample:
    """A vote, as ``sources.votes`` gives it."""
    if "vote" not in row:
        raise Dropped(Outcome.DAMAGED)
    responses, vote = row["responses"], row["vote"]
    if len(responses) == 1:
        raise Dropped(Outcome.THUMBS)
    if vote not in ("left", "right"):
        raise Dropped(Outcome.TIE if vote == "tie" else Outcome.BOTH_BAD)
    chosen, rejected = responses if vote == "left" else reversed(responses)
    sample = _from_turns(turns_of_messages(row["messages"]), chosen)
    if not rejected.strip():
        return replace(sample, unpaired=Outcome.NO_REJECTED)
    return replace(sample, rejected=_message(rejected))


def _from_thumb(row: Cells) -> Sample:
    """A vote on one response, as ``sources.votes`` gives it."""
    if "vote" not in row:
        raise Dropped(Outcome.DAMAGED)
    if len(row["responses"]) > 1:
        raise Dropped(Outcome.COMPARISON)
    sample = _from_turns(turns_of_messages(row["messages"]), row["responses"][0])
    if not sample.chosen:
        raise Dropped(Outcome.NO_ANSWER)
    return _with_label(sample, row["vote"] == "up")


def _misfit(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) if isinstance(error, ValueError) else f"text was expected ({error})"


READERS = {
    "prompt-chosen-rejected": _from_pair,
    "hh": _from_hh,
    "messages": _from_messages,
    "instruction": _from_instruction,
    "text": _from_text,
    "prompt": _from_prompt,
}


_OF_VOTES = {"vote": _from_vote, "thumb": _from_thumb}


def read_row(
    row: Mapping[str, Any],
    format: str,
    where: str,
    columns: Mapping[str, str] | None = None,
    counts: SourceCounts | None = None,
) -> Sample:
    """One row as a sample.

    Args:
        where: the row's file and number.
        columns: the columns of cells that have other names in the file.
        counts: where columns are noted that nobody reads although they look like content.

    Raises:
        Dropped: the row is left out, such as one that does not end with a response.
        HpcRlhfError: the row does not have what its format needs.
    """
    try:
        cells = Cells(row, columns or {}, CELLS[format])
        sample = {**READERS, **_OF_VOTES}[format](cells)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise HpcRlhfError(
            f"the row does not fit the format {format}: {_misfit(error)}; its columns are {', '.join(sorted(row))}",
            where=where,
            hint="fix the row, name its columns in the source's columns, or choose a format that fits: "
            + ", ".join(READERS),
        ) from error
    if not (sample.chosen or sample.unanswered):
        raise Dropped(Outcome.NO_ANSWER)
    if counts is not None and format != "prompt" and not cells.unread <= counts.ignored.keys():
        for column in cells.ignored(sample.text):
            if column not in counts.rewarded:
                counts.ignored.setdefault(column, where)
    return replace(sample, where=where, further=cells.further)
