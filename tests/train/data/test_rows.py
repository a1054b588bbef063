"""Rows of every format become a prompt and its answers, or one clear error."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data.rows import read_row, transcript

HI = "\n\nHuman: Hi\n\nAssistant:"
TWO_TURNS = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant:"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("format", "row", "prompt", "chosen", "rejected"),
    [
        ("prompt-chosen-rejected", {"prompt": HI, "chosen": " Yes.", "rejected": " No."}, HI, " Yes.", " No."),
        ("prompt-chosen-rejected", {"prompt": "Hi ", "chosen": "Yes.\n", "rejected": None}, HI, " Yes.", None),
        ("prompt-chosen-rejected", {"prompt": "Human: Hi\n\nAssistant: ", "response": "Yes."}, HI, " Yes.", None),
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": "", "rejected": "No."}, HI, None, " No."),
        ("hh", {"chosen": f"{TWO_TURNS} Me.", "rejected": f"{TWO_TURNS} You."}, TWO_TURNS, " Me.", " You."),
        ("hh", {"chosen": f"{HI} Me.", "rejected": f"{TWO_TURNS} You."}, HI, " Me.", None),
        ("hh", {"chosen": f"{HI} Me."}, HI, " Me.", None),
        ("hh", {"chosen": f"{HI} ", "rejected": f"{HI} You."}, HI, None, " You."),
        ("messages", {"messages": [user("Hi"), assistant("Yes.")]}, HI, " Yes.", None),
        (
            "messages",
            {"messages": [user("Hi"), assistant("Hello"), user("Who?"), assistant("Me.")]},
            TWO_TURNS, " Me.", None,
        ),
        (
            "messages",
            {"messages": [{"role": "system", "content": "Be brief. "}, user("Hi"), assistant("Yes.")]},
            f"\n\nBe brief.{HI}", " Yes.", None,
        ),
        (
            "messages",
            {"chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Hi"), assistant("No.")]},
            HI, " Yes.", " No.",
        ),
        (
            "messages",
            {"chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Ho"), assistant("No.")]},
            HI, " Yes.", None,
        ),
        ("messages", {"messages": [user("Hi"), assistant("Yes."), user("Bye")]}, None, None, None),
        ("messages", {"messages": []}, None, None, None),
        ("instruction", {"instruction": "Hi", "output": "Yes."}, HI, " Yes.", None),
        ("instruction", {"instruction": "Add.", "input": "1 2", "output": "3"}, transcript([("human", "Add.\n1 2")]), " 3", None),
        ("instruction", {"instruction": "Hi", "input": None, "output": None}, HI, None, None),
        ("text", {"text": " Once upon. "}, "", "Once upon.", None),
        ("text", {"text": "  "}, "", None, None),
    ],
)  # fmt: skip
def test_rows_become_samples(
    format: str, row: dict[str, Any], prompt: str | None, chosen: str | None, rejected: str | None
) -> None:
    assert read_row(row, format, "here") == {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("format", "row", "says"),
    [
        ("prompt-chosen-rejected", {"question": "Hi", "chosen": "Yes."}, "prompt"),
        ("prompt-chosen-rejected", {"prompt": "Hi", "answer": "Yes."}, "response"),
        ("prompt-chosen-rejected", {"prompt": None, "chosen": "Yes."}, "NoneType"),
        ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": 7}, "int"),
        ("prompt-chosen-rejected", {"prompt": ["Hi"], "chosen": "Yes."}, "list"),
        ("hh", {"prompt": "Hi", "rejected": "No."}, "chosen"),
        ("hh", {"chosen": "Just text, no turns.", "rejected": "Text."}, "no turn of the Assistant"),
        ("hh", {"chosen": [user("Hi")]}, "list"),
        ("messages", {"conversations": [user("Hi"), assistant("Yes.")]}, "chosen"),
        ("messages", {"messages": [{"from": "human", "value": "Hi"}]}, "role"),
        ("messages", {"messages": [{"role": "user"}, assistant("Yes.")]}, "content"),
        (
            "messages",
            {"messages": [user("Hi"), {"role": "tool", "content": "{}"}, assistant("Yes.")]},
            "tool",
        ),
        ("messages", {"messages": "Hi"}, "TypeError"),
        ("instruction", {"prompt": "Hi", "output": "Yes."}, "instruction"),
        ("instruction", {"instruction": "Hi", "response": "Yes."}, "output"),
        ("text", {"content": "Once upon."}, "text"),
        ("text", {"text": None}, "NoneType"),
    ],
)
def test_a_row_that_does_not_fit_is_one_clear_error(format: str, row: dict[str, Any], says: str) -> None:
    with pytest.raises(HpcRlhfError) as caught:
        read_row(row, format, "data.jsonl, row 3")
    assert str(caught.value).startswith("data.jsonl, row 3: a row does not fit the format " + format)
    assert says in caught.value.message
    assert all(column in caught.value.message for column in row)
    assert "prompt-chosen-rejected" in str(caught.value.hint)


def test_a_transcript_asks_for_the_next_answer() -> None:
    turns = [("system", " Be kind."), ("human", "Hi "), ("assistant", " Hello"), ("Human", "Who?")]
    assert transcript(turns) == f"\n\nBe kind.{TWO_TURNS}"
    assert transcript([("user", "Hi")]) == HI
    with pytest.raises(KeyError):
        transcript([("tool", "Hi")])
