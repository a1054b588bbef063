"""Rows of every format become a prompt with its responses, or one clear error."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.row_counts import Outcome
from hpc_rlhf.train.data.formats import read_row
from hpc_rlhf.train.data.messages import Dropped
from hpc_rlhf.train.data.rows import Sample, Turn, transcript, turns_of

HI = "\n\nHuman: Hi\n\nAssistant:"
TWO_TURNS = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant:"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shared(speaker: str, text: str) -> dict[str, str]:
    """A turn in ShareGPT's form."""
    return {"from": speaker, "value": text}


ASKED = (("human", "Hi"),)
ASKED_TWICE = (("human", "Hi"), ("assistant", "Hello"), ("human", "Who?"))


@pytest.mark.parametrize(
    ("format", "row", "turns", "prompt", "chosen", "rejected"),
    [
        ("prompt-chosen-rejected", {"prompt": HI, "chosen": " Yes.", "rejected": " No."}, ASKED, HI, " Yes.", " No."),
        ("prompt-chosen-rejected", {"prompt": TWO_TURNS, "chosen": " Me."}, ASKED_TWICE, TWO_TURNS, " Me.", ""),
        ("prompt-chosen-rejected", {"prompt": "Hi ", "chosen": "Yes.\n", "rejected": None}, ASKED, HI, " Yes.", ""),
        ("prompt-chosen-rejected", {"prompt": "Human: Hi\n\nAssistant: ", "response": "Yes."}, ASKED, HI, " Yes.", ""),
        ("hh", {"chosen": f"{TWO_TURNS} Me.", "rejected": f"{TWO_TURNS} You."}, ASKED_TWICE, TWO_TURNS, " Me.", " You."),  # noqa: E501
        ("hh", {"chosen": f"{HI} Me.", "rejected": f"{TWO_TURNS} You."}, ASKED, HI, " Me.", ""),
        ("hh", {"chosen": f"{HI} Me."}, ASKED, HI, " Me.", ""),
        ("messages", {"messages": [user("Hi"), assistant("Yes.")]}, ASKED, HI, " Yes.", ""),
        (
            "messages",
            {"messages": [user("Hi"), assistant("Hello"), user("Who?"), assistant("Me.")]},
            ASKED_TWICE, TWO_TURNS, " Me.", "",
        ),
        (
            "messages",
            {"messages": [{"role": "system", "content": "Be brief. "}, user("Hi"), assistant("Yes.")]},
            (("system", "Be brief. "), ("human", "Hi")), f"\n\nBe brief.{HI}", " Yes.", "",
        ),
        (
            "messages",
            {"messages": [user(TWO_TURNS), assistant("Yes.")]},
            (("human", TWO_TURNS),), f"\n\nHuman: {TWO_TURNS.strip()}\n\nAssistant:", " Yes.", "",
        ),
        (
            "messages",
            {"chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Hi"), assistant("No.")]},
            ASKED, HI, " Yes.", " No.",
        ),
        (
            "messages",
            {"chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Ho"), assistant("No.")]},
            ASKED, HI, " Yes.", "",
        ),
        # TRL's formats: conversational with a prompt of its own, and prompt-completion.
        (
            "messages",
            {"prompt": [user("Hi")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
            ASKED, HI, " Yes.", " No.",
        ),
        ("messages", {"prompt": [user("Hi")], "completion": [assistant("Yes.")]}, ASKED, HI, " Yes.", ""),
        ("messages", {"prompt": "Hi", "chosen": [assistant("Yes.")]}, ASKED, HI, " Yes.", ""),
        ("messages", {"prompt": "Hi", "chosen": [user("Hi"), assistant("Yes.")]}, ASKED, HI, " Yes.", ""),
        (
            "messages",
            {
                "prompt": [user("Hi")],
                "chosen": [assistant("Hello"), user("Who?"), assistant("Me.")],
                "rejected": [assistant("Hello"), user("Who?"), assistant("You.")],
            },
            ASKED_TWICE, TWO_TURNS, " Me.", " You.",
        ),
        ("prompt-chosen-rejected", {"prompt": "Hi", "completion": "Yes."}, ASKED, HI, " Yes.", ""),
        # ShareGPT, OpenAI's parts, developer as system, and messages as JSON.
        (
            "messages",
            {"conversations": [shared("human", "Hi"), shared("gpt", "Yes.")]},
            ASKED, HI, " Yes.", "",
        ),
        (
            "messages",
            {"system": "Be brief.", "conversations": [shared("human", "Hi"), shared("gpt", "Yes.")]},
            (("system", "Be brief."), ("human", "Hi")), f"\n\nBe brief.{HI}", " Yes.", "",
        ),
        (
            "messages",
            {"messages": [{**user(""), "content": [{"type": "text", "text": it} for it in "Hi"]}, assistant("Yes.")]},
            ASKED, HI, " Yes.", "",
        ),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "Be brief."}, user("Hi"), assistant("Yes.")]},
            (("system", "Be brief."), ("human", "Hi")), f"\n\nBe brief.{HI}", " Yes.", "",
        ),
        ("messages", {"messages": json.dumps([user("Hi"), assistant("Yes.")])}, ASKED, HI, " Yes.", ""),
        (
            "prompt-chosen-rejected",
            {"system": "Be brief.", "prompt": "Hi", "chosen": "Yes."},
            (("system", "Be brief."), ("human", "Hi")), f"\n\nBe brief.{HI}", " Yes.", "",
        ),
        (
            "instruction",
            {"instruction": "Who?", "output": "Me.", "history": [["Hi", "Hello"]], "system": ""},
            ASKED_TWICE, TWO_TURNS, " Me.", "",
        ),
        # Prompts that differ only in the space around a turn are the same.
        (
            "hh",
            {"chosen": "\n\nHuman: Hi \n\nAssistant: Me.", "rejected": f"{HI} You."},
            ASKED, "\n\nHuman: Hi \n\nAssistant:", " Me.", " You.",
        ),
        ("instruction", {"instruction": "Hi", "output": "Yes."}, ASKED, HI, " Yes.", ""),
        (
            "instruction",
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            (("human", "Add.\n1 2"),), transcript([("human", "Add.\n1 2")]), " 3", "",
        ),
        ("text", {"text": " Once upon. "}, (), "", "Once upon.", ""),
    ],
)  # fmt: skip
def test_rows_become_samples(
    format: str, row: dict[str, Any], turns: tuple[Turn, ...], prompt: str, chosen: str, rejected: str
) -> None:
    assert replace(read_row(row, format, "here"), unpaired=None) == Sample(turns, prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("format", "row", "outcome"),
    [
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": "", "rejected": "No."}, Outcome.NO_ANSWER),
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": None, "rejected": "No."}, Outcome.NULL),
        ("prompt-chosen-rejected", {"prompt": None, "chosen": "Yes."}, Outcome.NULL),
        ("hh", {"chosen": f"{HI} ", "rejected": f"{HI} You."}, Outcome.NO_ANSWER),
        ("hh", {"chosen": None, "rejected": f"{HI} You."}, Outcome.NULL),
        ("hh", {"chosen": f"{HI} Yes.\n\nHuman: Thanks", "rejected": f"{HI} No."}, Outcome.USER_LAST),
        ("messages", {"prompt": [user("Hi")], "chosen": [], "rejected": [assistant("No.")]}, Outcome.EMPTY),
        ("messages", {"messages": [user("Hi"), assistant("Yes."), user("Bye")]}, Outcome.USER_LAST),
        ("messages", {"messages": []}, Outcome.EMPTY),
        ("messages", {"messages": None}, Outcome.NULL),
        ("instruction", {"instruction": "Hi", "input": None, "output": None}, Outcome.NULL),
        ("text", {"text": "  "}, Outcome.EMPTY),
        ("text", {"text": None}, Outcome.NULL),
    ],
)
def test_a_row_without_a_response_is_left_out_with_its_reason(format: str, row: dict[str, Any], outcome: Any) -> None:
    with pytest.raises(Dropped) as caught:
        read_row(row, format, "here")
    assert caught.value.outcome is outcome


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        (HI, ASKED),
        (TWO_TURNS, ASKED_TWICE),
        (f"Be kind.\nAlways.{HI}", (("system", "Be kind.\nAlways."), ("human", "Hi"))),
        (
            "\n\nHuman: One\n\nTwo Human: x \n\nHuman:Three\n\nAssistant:",
            (("human", "One\n\nTwo Human: x"), ("human", "Three")),
        ),
        ("\n\nHuman: \n\nAssistant:", (("human", ""),)),
    ],
)
def test_a_transcript_is_split_into_turns(prompt: str, turns: tuple[Turn, ...]) -> None:
    assert turns_of(prompt) == turns


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("prompt-chosen-rejected", {"question": "Hi", "chosen": "Yes."}, "prompt"),
        ("prompt-chosen-rejected", {"prompt": "Hi", "answer": "Yes."}, "response"),
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": True}, "chosen is not text but of type bool"),
        ("prompt-chosen-rejected", {"prompt": ["Hi"], "chosen": "Yes."}, "list"),
        ("hh", {"prompt": "Hi", "rejected": "No."}, "chosen"),
        ("hh", {"chosen": "Just text, no turns.", "rejected": "Text."}, "no Assistant turn"),
        ("hh", {"chosen": [user("Hi")]}, "list"),
        ("messages", {"dialogue": [user("Hi"), assistant("Yes.")]}, "chosen"),
        ("messages", {"messages": [{"speaker": "human", "value": "Hi"}]}, "from"),
        ("messages", {"messages": [user("Hi"), shared("observation", "3"), assistant("Yes.")]}, "tools"),
        ("messages", {"messages": [user("Hi"), {**assistant(""), "tool_calls": [{}]}]}, "tools"),
        ("messages", {"messages": [user("Hi"), {"role": "judge", "content": "x"}, assistant("Yes.")]}, "judge"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("Yes.")]},
            "image_url",
        ),
        ("messages", {"messages": [{"role": "user"}, assistant("Yes.")]}, "content"),
        ("messages", {"messages": [user("Hi"), {"role": "tool", "content": "{}"}, assistant("Yes.")]}, "tool"),
        ("messages", {"chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}, "no user turn"),
        ("messages", {"messages": "Hi"}, "a list of messages was expected"),
        ("instruction", {"prompt": "Hi", "output": "Yes."}, "instruction"),
        ("instruction", {"instruction": "Hi", "response": "Yes."}, "output"),
        ("text", {"content": "Once upon."}, "text"),
    ],
)
def test_a_row_that_does_not_fit_is_one_clear_error(format: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(HpcRlhfError) as caught:
        read_row(row, format, "data.jsonl, row 3")
    assert str(caught.value).startswith("data.jsonl, row 3: the row does not fit the format " + format)
    assert message in caught.value.message
    assert caught.value.exit_code == 2
    assert all(column in caught.value.message for column in row)
    assert "prompt-chosen-rejected" in str(caught.value.hint)


def test_a_transcript_ends_where_the_response_begins() -> None:
    turns = [("system", " Be kind."), ("human", "Hi "), ("assistant", " Hello"), ("Human", "Who?")]
    assert transcript(turns) == f"\n\nBe kind.{TWO_TURNS}"
    assert transcript([("user", "Hi")]) == HI
    with pytest.raises(KeyError):
        transcript([("tool", "Hi")])


@pytest.mark.parametrize(
    ("format", "row", "outcome"),
    [
        ("hh", {"chosen": f"{HI} Yes.", "rejected": "\n\nHuman: Ho\n\nAssistant: No."}, Outcome.PROMPTS_DIFFER),
        ("hh", {"chosen": f"{HI} Yes.", "rejected": f"{HI} No.\n\nHuman: Bye"}, Outcome.NO_REJECTED),
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": "Yes.", "rejected": None}, Outcome.NO_REJECTED),
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": "Yes."}, None),
        (
            "messages",
            {"chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Ho"), assistant("No.")]},
            Outcome.PROMPTS_DIFFER,
        ),
    ],
)
def test_a_row_that_is_no_pair_says_why(format: str, row: dict[str, Any], outcome: Any) -> None:
    sample = read_row(row, format, "here")
    assert (sample.chosen, sample.rejected, sample.unpaired) == (" Yes.", "", outcome)


def test_prompts_of_a_pair_are_compared_without_spaces_around_turns() -> None:
    rejected = HI.replace("\n\nAssistant:", " \n\nAssistant:") + " No."
    assert read_row({"chosen": f"{HI} Yes.", "rejected": rejected}, "hh", "here").rejected == " No."
