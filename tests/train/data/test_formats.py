"""Rows as TRL and others document them, under any names of columns; what is not read is named."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.row_counts import Kind, Outcome, SourceCounts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import Data, RewardSpec
from hpc_rlhf.train import survey
from hpc_rlhf.train.data.files import read_rows
from hpc_rlhf.train.data.formats import read_row
from hpc_rlhf.train.data.messages import Dropped
from hpc_rlhf.train.data.rows import transcript
from hpc_rlhf.train.data.sources import read, stage_samples
from hpc_rlhf.train.data.tokenized import encoded, prepare
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny
from tests.train.data.specs import spec_of
from tests.train.data.test_rows import assistant, user

PAIR = "prompt-chosen-rejected"
SKY = (("human", "The sky is"),)
ASKED = (("human", "What color?"),)


@pytest.mark.parametrize(
    ("format", "row", "turns", "chosen", "rejected"),
    [
        (PAIR, {"prompt": "The sky is"}, SKY, "", ""),
        (PAIR, {"prompt": "The sky is", "completion": " blue."}, SKY, " blue.", ""),
        (PAIR, {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, SKY, " blue.", " green."),
        (PAIR, {"chosen": "The sky is blue.", "rejected": "The sky is green."}, SKY, " blue.", " green."),
        (PAIR, {"chosen": "The sky is grey.", "rejected": "The sky is green."}, SKY, " grey.", " green."),
        (PAIR, {"chosen": "The sky is", "rejected": "The sky is green."}, SKY, None, ""),
        (PAIR, {"chosen": "\n\nHuman: What color?\n\nAssistant: It is blue.",
            "rejected": "\n\nHuman: What color?\n\nAssistant: It is green."},
            ASKED, " It is blue.", " It is green."),
        (PAIR, {"chosen": "Human: What color?\n\nAssistant: It is blue.",
            "rejected": "Human: What color?\n\nAssistant: It is green."},
            ASKED, " It is blue.", " It is green."),
        (PAIR, {"chosen": "Be nice.\n\nHuman: What color?\n\nAssistant: It is blue.",
            "rejected": "Be nice.\n\nHuman: What color?\n\nAssistant: It is green."},
            (("system", "Be nice."), *ASKED), " It is blue.", " It is green."),
        ("hh", {"chosen": "Human: What color?\n\nAssistant: Blue.", "label": True}, ASKED, " Blue.", ""),
        (PAIR, {"prompt": "The sky is", "completion": " blue.", "label": float("nan")}, SKY, " blue.", ""),
        (PAIR, {"prompt": "The sky is", "completion": " blue.", "label": True}, SKY, " blue.", ""),
        ("messages", {"prompt": [user("What color?")]}, ASKED, "", ""),
        ("messages", {"prompt": json.dumps([user("What color?")])}, ASKED, "", ""),
        ("messages", {"prompt": json.dumps([user("What color?")]), "completion": json.dumps([assistant("Blue.")])},
            ASKED, " Blue.", ""),
        ("messages", {"prompt": [user("What color?")], "completion": [assistant("Blue.")], "label": True},
            ASKED, " Blue.", ""),
        ("messages", {"chosen": [user("What color?"), assistant("Blue.")],
            "rejected": [user("What color?"), assistant("Green.")], "messages": [user("What color?"), assistant("B")]},
            ASKED, " Blue.", " Green."),
        ("instruction", {"instruction": "The sky", "input": "is"}, (("human", "The sky\nis"),), "", ""),
        ("instruction", {"instruction": "The sky is", "output": "blue.", "history": "[]"}, SKY, " blue.", ""),
    ],
)  # fmt: skip
def test_documented_rows_are_read(
    format: str, row: dict[str, Any], turns: Any, chosen: str | None, rejected: str
) -> None:
    if chosen is None:
        with pytest.raises(Dropped):
            read_row(row, format, "here")
        return
    sample = read_row(row, format, "here")
    assert (sample.turns, sample.chosen, sample.rejected) == (turns, chosen, rejected)
    assert sample.unanswered is (None if chosen else Outcome.PROMPT_ONLY)


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"prompt": "Hi", "answer": "Yes."}, "'response' is missing"),
        ({"prompt": "Hi", "Chosen": "Yes.", "Rejected": "No."}, "'response' is missing"),
        ({"prompt": "Hi", "best_response": "Yes, I do."}, "'response' is missing"),
        ({"prompt": "Hi", "completions": ["One.", "Two."], "labels": [True, False]}, "'response' is missing"),
        ({"question": "Hi", "chosen": "I am.", "rejected": "I was."}, "'prompt' is missing"),
        ({"document": "A long text on it.", "chosen": "It is so.", "rejected": "It is not."}, "text in document"),
        ({"prompt": "Hi", "completion": "Yes.", "label": -1}, "label is -1"),
        ({"prompt": [user("Hi")], "chosen": [assistant("Yes.")]}, "set format: messages"),
    ],
)
def test_no_column_is_guessed(row: dict[str, Any], missing: str) -> None:
    with pytest.raises(HpcRlhfError, match=missing) as caught:
        read_row(row, PAIR, "a.jsonl:3")
    assert caught.value.where == "a.jsonl:3"


@pytest.mark.parametrize(
    ("rejected", "outcome"),
    [
        ("Green.", Outcome.NO_COMMON_PROMPT),
        ("The sky is blue.", Outcome.NO_COMMON_PROMPT),
        ("The sky", Outcome.NO_COMMON_PROMPT),
        (None, Outcome.NULL),
    ],
)
def test_a_pair_without_a_common_beginning_has_no_prompt(rejected: str | None, outcome: Outcome) -> None:
    for row in (
        {"chosen": "The sky is blue.", "rejected": rejected},
        {"chosen": rejected, "rejected": "The sky is blue."},
    ):
        with pytest.raises(Dropped) as caught:
            read_row(row, PAIR, "here")
        assert caught.value.outcome is outcome


@pytest.mark.parametrize(
    ("format", "columns", "row", "read"),
    [
        (PAIR, {"prompt": "question", "chosen": "best"}, {"question": "What color?", "best": 7}, (ASKED, " 7", "")),
        (
            PAIR,
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"q": "What color?", "a": "Blue.", "b": "Green."},
            (ASKED, " Blue.", " Green."),
        ),
        (PAIR, {"response": "chosen_2"}, {"prompt": "What color?", "chosen_2": "B", "chosen": "A"}, (ASKED, " B", "")),
        ("hh", {"chosen": "a"}, {"a": "\n\nHuman: What color?\n\nAssistant: Blue."}, (ASKED, " Blue.", "")),
        ("messages", {"messages": "chat"}, {"chat": [user("What color?"), assistant("B")]}, (ASKED, " B", "")),
        ("instruction", {"instruction": "q", "output": "a"}, {"q": "What color?", "a": "B"}, (ASKED, " B", "")),
        ("text", {"text": "document"}, {"document": "Once upon."}, ((), "Once upon.", "")),
    ],
)
def test_columns_may_have_other_names(format: str, columns: dict[str, str], row: dict[str, Any], read: Any) -> None:
    sample = read_row(row, format, "here", columns)
    assert (sample.turns, sample.chosen, sample.rejected) == read
    with pytest.raises(HpcRlhfError, match=f"the column {next(iter(columns.values()))}, which is its .*, is missing"):
        read_row({"x": "y"}, format, "here", columns)


def test_columns_of_the_demo_have_no_other_names() -> None:
    with pytest.raises(ValueError, match="only a source with a path"):
        SourceSpec(demo=10, columns={"prompt": "x"})
    assert "columns" not in SourceSpec(path="a.jsonl", format="hh").model_dump(mode="json")
    assert SourceSpec(path="a", format="hh", columns={"chosen": "x"}).model_dump()["columns"] == {"chosen": "x"}


@pytest.mark.parametrize(
    ("format", "row", "ignored"),
    [
        (PAIR, {"prompt": "Hi", "chosen": "Yes.", "context": "Be kind."}, ["context"]),
        (PAIR, {"prompt": "Hi", "chosen": "Yes.", "id": "7f", "source": "a b", "score": 1.5, "tags": []}, []),
        (PAIR, {"prompt": "Hi", "chosen": "Yes.", "notes": "one two three four"}, ["notes"]),
        (PAIR, {"prompt": "Hi", "chosen": "Yes, I do.", "answer": "I do."}, []),
        (PAIR, {"prompt": "Hi", "chosen": "Yes.", "answer": "No.", "history": [["a", "b"]]}, ["answer", "history"]),
        ("hh", {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "system": "Briefly."}, ["system"]),
        ("messages", {"messages": [user("Hi"), assistant("Yes.")], "prompt": "Hi", "prompt_id": "1"}, []),
        ("messages", {"messages": [user("Hi"), assistant("Yes.")], "chosen": [assistant("No.")]}, ["chosen"]),
        ("text", {"text": "Once.", "title": "A tale", "label": "good"}, []),
    ],
)
def test_a_column_with_content_that_is_not_read_is_named(format: str, row: dict[str, Any], ignored: list[str]) -> None:
    counts = SourceCounts("a.jsonl")
    read_row(row, format, "a.jsonl:1", counts=counts)
    assert list(counts.ignored) == ignored
    assert SourceCounts.of(counts.to_dict()).warnings() == [
        f"the column {name} of a.jsonl is not read (first: a.jsonl:1)" for name in ignored
    ]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (7, "7"), (1.5, "1.5"), (Decimal("1.50"), "1.50"), (10**30, "1" + "0" * 30),
        (datetime.date(2026, 1, 31), "2026-01-31"), (datetime.datetime(2026, 1, 31, 12), "2026-01-31 12:00:00"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", [PAIR, "messages", "instruction", "text"])
def test_numbers_and_dates_are_text(cell: Any, text: str, format: str) -> None:
    row = {
        PAIR: {"prompt": "When?", "chosen": cell},
        "messages": {"messages": [user("When?"), {"role": "assistant", "content": cell}]},
        "instruction": {"instruction": "When?", "output": cell},
        "text": {"text": cell},
    }[format]
    assert read_row(row, format, "here").chosen.strip() == text


def test_numbers_are_text_as_a_file_has_them(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    answers = ["1.50", "1e5", "007", "-0.0"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "chosen": 1.50}\n{"prompt": "p", "chosen": 1e5}\n')
    (tmp_path / "b.csv").write_text("prompt,chosen\np,007\np,-0.0\n")
    read = [read_row(row, PAIR, where) for name in ("a.jsonl", "b.csv") for where, row in read_rows(tmp_path / name)]
    assert [sample.chosen for sample in read] == [f" {answer}" for answer in answers]
    dates = pa.table({"prompt": ["p", "p"], "chosen": pa.array([datetime.date(2026, 1, 31), None])})
    pq.write_table(dates, tmp_path / "c.parquet")
    (_, first), (where, second) = read_rows(tmp_path / "c.parquet")
    assert read_row(first, PAIR, "here").chosen == " 2026-01-31"
    with pytest.raises(Dropped):
        read_row(second, PAIR, where)
    with pytest.raises(Dropped):
        read_row({"prompt": "p", "chosen": float("nan")}, PAIR, "here")


@pytest.mark.parametrize("label", [False, 0, "false", "False", "0"])
def test_a_response_that_its_label_calls_bad_is_not_learned(label: Any) -> None:
    sample = read_row({"prompt": "Hi", "completion": "Go away.", "label": label}, PAIR, "here")
    assert (sample.chosen, sample.unanswered) == ("", Outcome.BAD_ANSWER)
    row = {"messages": [user("Hi"), assistant("Go away.")], "label": label}
    assert read_row(row, "messages", "here").unanswered is Outcome.BAD_ANSWER


def write(path: Path, rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "format": PAIR, **fields}


def test_prompts_without_responses_go_to_the_stages_that_need_none(tmp_path: Path) -> None:
    prompts = write(
        tmp_path / "a.jsonl", [{"question": f"Question {n}?"} for n in range(30)], columns={"prompt": "question"}
    )
    spec = spec_of(prompts, {"demo": 60})
    assert (survey.look(spec).problems, survey.look(spec).notes) == ([], [])
    used = [sample.prompt for sample, _, _ in stage_samples(spec, "ppo") if "Question" in sample.prompt]
    assert len(used) == 30
    for stage in ("sft", "reward"):
        assert all("Question" not in sample.prompt for sample, _, _ in stage_samples(spec, stage))
    (problem,) = survey.look(spec_of(prompts, stages=("sft",))).problems
    assert problem["what"].startswith("none of the rows gives prompts with responses, which sft needs; all 30 were")


def test_labelled_rows_are_counted_by_stage(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}?", "completion": "Yes.", "label": n % 2 == 0} for n in range(40)]
    spec = spec_of(write(tmp_path / "a.jsonl", rows), stages=("sft",))
    counts = [SourceCounts("a")]
    assert len(list(stage_samples(spec, "sft", counts))) == 20
    assert counts[0].outcomes[Outcome.BAD_ANSWER].rows == 20
    (note,) = survey.look(spec).notes
    assert "50% of the rows" in note
    assert "20 with a response that its label calls bad" in note


def test_labels_and_pairs_reach_kto_and_other_responses_do_not(tmp_path: Path) -> None:
    """One response good, one bad, one without a label, and a pair."""
    tokenizer = tiny.tokenizer()
    answers = [
        {"completion": "Good.", "label": True},
        {"completion": "Bad.", "label": False},
        {"completion": "Some."},
        {"chosen": "Better.", "rejected": "Worse."},
    ]
    files = [write(tmp_path / f"{n}.jsonl", [{"prompt": "Q?", **each}]) for n, each in enumerate(answers)]
    spec = spec_of(*files, stages=("kto",))
    counts = [SourceCounts(f"{n}") for n in range(len(files))]
    rows = [row for _, row, _ in encoded(stage_samples(spec, "kto", counts), tokenizer, spec, Data.LABELED)]
    texts = [(tokenizer.decode(row["chosen_ids"], skip_special_tokens=True), row["label"]) for row in rows]
    assert texts == [(" Good.", 1), (" Bad.", 0), (" Better.", 1), (" Worse.", 0)]
    assert counts[2].outcomes[Outcome.NO_LABEL].rows == 1
    assert [each.rows(Kind.USED) for each in counts] == [1, 1, 0, 1]
    assert survey.look(spec).problems == []
    (problem,) = survey.look(spec_of(files[2], stages=("kto",))).problems
    assert problem["what"].startswith("none of the rows gives responses with a label, which kto needs")


def with_margins(source: dict[str, Any], *others: dict[str, Any]) -> JobSpec:
    raw = spec_of(source, *others, stages=("sft", "reward")).model_dump(mode="json", exclude={"stages"})
    return JobSpec.model_validate({**raw, "stages": {"sft": {}, "reward": {"loss": "last", "margins": True}}})


def pairs(margin: Callable[[int], Any], column: str = "margin") -> list[dict[str, Any]]:
    return [{"prompt": f"Q{n}?", "chosen": "Yes.", "rejected": "No.", column: margin(n)} for n in range(60)]


@pytest.mark.parametrize("column", ["margin", "gap"])
def test_margins_reach_the_reward_model(column: str, tmp_path: Path, world: World) -> None:
    columns = {"margin": column} if column != "margin" else {}
    rows = pairs(lambda n: (n / 4, str(n / 4), n)[n % 3], column)
    spec = with_margins(write(tmp_path / "a.jsonl", rows, columns=columns))
    assert survey.look(spec).problems == []
    data = prepare(spec, "reward", tiny.tokenizer(), tmp_path / "reward", world)
    asked = {f"\n\nHuman: {row['prompt']}\n\nAssistant:": float(row[column]) for row in rows}
    assert len(data.train) > 5
    assert all(row["margin"] == asked[row["prompt"]] for row in data.train)
    assert "margin" not in prepare(spec, "sft", tiny.tokenizer(), tmp_path / "sft", world).train[0]


@pytest.mark.parametrize("margin", [None, "much", True, float("nan"), [1.0]])
def test_a_pair_without_a_margin_is_refused_by_check_and_by_the_job(margin: Any, tmp_path: Path, world: World) -> None:
    source = write(tmp_path / "a.jsonl", pairs(lambda n: margin if n == 7 else 1.0))
    spec = with_margins(source)
    (problem,) = survey.look(spec).problems
    assert problem["path"] == "data.sources.0"
    assert problem["what"] == f"{tmp_path}/a.jsonl:8: the pair has no number in the column margin"
    with pytest.raises(HpcRlhfError, match="the pair has no number in the column margin") as caught:
        prepare(spec, "reward", tiny.tokenizer(), tmp_path / "reward", world)
    assert caught.value.exit_code == 2
    assert survey.look(spec_of(source)).problems == [], "nobody asks for margins"


def test_margins_need_the_last_token_and_a_source_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="margins needs loss: last"):
        RewardSpec(margins=True)
    (problem,) = survey.look(with_margins(write(tmp_path / "a.jsonl", pairs(float)), {"demo": 30})).problems
    assert problem["path"] == "data.sources.1"


CHAT = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hi."), user("What color?")]


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("What color?", ASKED),
        ("\n\nHuman: Hi\n\nAssistant: Hi.\n\nHuman: What color?\n\nAssistant:",
            (("human", "Hi"), ("assistant", "Hi."), *ASKED)),
        ([user("What color?")], ASKED),
        (json.dumps([user("What color?")]), ASKED),
        (CHAT, (("system", "Be kind."), ("human", "Hi"), ("assistant", "Hi."), *ASKED)),
    ],
)  # fmt: skip
def test_the_format_prompt_reads_nothing_but_the_prompt(prompt: Any, turns: Any) -> None:
    counts = SourceCounts("a.jsonl")
    row = {"prompt": prompt, "answer": "It is blue, I think.", "response": "Blue.", "level": 3}
    sample = read_row(row, "prompt", "here", counts=counts)
    assert (sample.turns, sample.chosen, sample.unanswered) == (turns, "", Outcome.PROMPT_ONLY)
    assert sample.further == {"answer": "It is blue, I think.", "response": "Blue.", "level": 3}
    assert not counts.ignored
    with_system = read_row({"prompt": "What color?", "system": "Briefly."}, "prompt", "here")
    assert with_system.turns == (("system", "Briefly."), *ASKED)
    for broken in (None, [], ""):
        with pytest.raises(Dropped):
            read_row({"prompt": broken}, "prompt", "here")


FRAME = {"system": "Be brief.", "few_shot": "Question: 1+1?\nAnswer: 2\n"}


@pytest.mark.parametrize(
    ("format", "row", "turns"),
    [
        ("prompt", {"prompt": "What color?"},
            (("system", "Be brief."), ("human", "Question: 1+1?\nAnswer: 2\n\nWhat color?"))),
        (PAIR, {"prompt": "What color?", "chosen": "Blue.", "rejected": "Red."},
            (("system", "Be brief."), ("human", "Question: 1+1?\nAnswer: 2\n\nWhat color?"))),
        ("messages", {"messages": [*CHAT, assistant("Blue.")]},
            (("system", "Be kind."), ("human", "Question: 1+1?\nAnswer: 2\n\nHi"), ("assistant", "Hi."), *ASKED)),
    ],
)  # fmt: skip
def test_a_source_adds_its_system_prompt_and_its_examples(
    format: str, row: dict[str, Any], turns: Any, tmp_path: Path
) -> None:
    plain = write(tmp_path / "a.jsonl", [row], format=format)
    (sample,) = read(SourceSpec.model_validate({**plain, **FRAME}), 1)
    (before,) = read(SourceSpec.model_validate(plain), 1)
    assert (sample.turns, sample.prompt) == (turns, transcript(turns))
    assert (sample.chosen, sample.rejected) == (before.chosen, before.rejected)


def test_plain_text_has_no_frame_and_sources_without_one_are_dumped_as_before() -> None:
    with pytest.raises(ValueError, match="plain text has no system prompt"):
        SourceSpec(path="a.jsonl", format="text", system="Be brief.")
    assert set(SourceSpec(demo=10).model_dump()) == {"path", "demo", "format", "weight", "split", "subset"}
