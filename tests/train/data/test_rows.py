"""Rows of every format become a prompt with its responses, or one clear error."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data.rows import Sample, Turn, read_row, transcript, turns_of

HI = "\n\nHuman: Hi\n\nAssistant:"
TWO_TURNS = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant:"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


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
            (("system", "Be brief."), ("human", "Hi")), f"\n\nBe brief.{HI}", " Yes.", "",
        ),
        (
            "messages",
            {"messages": [user(TWO_TURNS), assistant("Yes.")]},
            (("human", TWO_TURNS.strip()),), f"\n\nHuman: {TWO_TURNS.strip()}\n\nAssistant:", " Yes.", "",
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
    assert read_row(row, format, "here") == Sample(turns, prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": "", "rejected": "No."}),
        ("hh", {"chosen": f"{HI} ", "rejected": f"{HI} You."}),
        ("messages", {"messages": [user("Hi"), assistant("Yes."), user("Bye")]}),
        ("messages", {"messages": []}),
        ("instruction", {"instruction": "Hi", "input": None, "output": None}),
        ("text", {"text": "  "}),
    ],
)
def test_rows_without_a_response_are_no_samples(format: str, row: dict[str, Any]) -> None:
    assert read_row(row, format, "here") is None


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
        ("prompt-chosen-rejected", {"prompt": None, "chosen": "Yes."}, "NoneType"),
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": 7}, "int"),
        ("prompt-chosen-rejected", {"prompt": ["Hi"], "chosen": "Yes."}, "list"),
        ("hh", {"prompt": "Hi", "rejected": "No."}, "chosen"),
        ("hh", {"chosen": "Just text, no turns.", "rejected": "Text."}, "no Assistant turn"),
        ("hh", {"chosen": [user("Hi")]}, "list"),
        ("messages", {"conversations": [user("Hi"), assistant("Yes.")]}, "chosen"),
        ("messages", {"messages": [{"from": "human", "value": "Hi"}]}, "role"),
        ("messages", {"messages": [{"role": "user"}, assistant("Yes.")]}, "content"),
        ("messages", {"messages": [user("Hi"), {"role": "tool", "content": "{}"}, assistant("Yes.")]}, "tool"),
        ("messages", {"messages": "Hi"}, "text was expected"),
        ("instruction", {"prompt": "Hi", "output": "Yes."}, "instruction"),
        ("instruction", {"instruction": "Hi", "response": "Yes."}, "output"),
        ("text", {"content": "Once upon."}, "text"),
        ("text", {"text": None}, "NoneType"),
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
