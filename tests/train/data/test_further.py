"""Further columns of the data reach rewards as they are, under the names that the spec gives them."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rlhf.errors import SpecError
from hpc_rlhf.run.row_counts import SourceCounts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.rewards import RewardItem
from hpc_rlhf.train.data.formats import read_row
from hpc_rlhf.train.data.further import columns_of
from hpc_rlhf.train.data.tokenized import prepare, prepare_mixture
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny
from tests.train.data.specs import spec_of
from tests.train.data.test_rows import assistant, user

PAIR = "prompt-chosen-rejected"


def rewarded(*sources: dict[str, Any], **data: Any) -> JobSpec:
    """A spec whose PPO stage has a reward."""
    return spec_of(*sources, stages=("sft", "ppo"), **data).with_stages(ppo={"rewards": (RewardItem(exact="answer"),)})


def write(path: Path, rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "format": PAIR, **fields}


@pytest.mark.parametrize(
    ("format", "columns", "row", "further"),
    [
        (PAIR, {}, {"prompt": "1+1?", "chosen": "Two", "answer": 2, "level": "easy"}, {"answer": 2, "level": "easy"}),
        (PAIR, {"prompt": "q", "answer": "truth"}, {"q": "1+1?", "truth": "2", "id": 7}, {"answer": "2", "id": 7}),
        (PAIR, {"prompt": "q", "answer": "a", "chosen": "a"}, {"q": "1+1?", "a": "2"}, {"answer": "2"}),
        (PAIR, {"answer": "truth"}, {"prompt": "1+1?", "chosen": "2", "answer": "x", "truth": "2"}, {"answer": "2"}),
        (PAIR, {}, {"prompt": "1+1?", "chosen": "2", "rejected": "3", "margin": 1.0, "system": "Be brief."}, {}),
        ("messages", {"tests": "t"}, {"messages": [user("Hi"), assistant("Yes.")], "t": ["assert 1"]},
            {"tests": ["assert 1"]}),
        ("instruction", {"truth": "output"}, {"instruction": "1+1?", "output": "2", "input": ""}, {"truth": "2"}),
    ],
)  # fmt: skip
def test_what_the_format_does_not_read_is_for_rewards(
    format: str, columns: dict[str, str], row: dict[str, Any], further: dict[str, Any]
) -> None:
    counts = SourceCounts("a.jsonl")
    assert read_row(row, format, "here", columns, counts).further == further
    assert not counts.ignored.keys() & set(columns.values()), "the spec names them, so they are not forgotten"


def test_all_rows_have_the_columns_of_all_sources(tmp_path: Path, world: World) -> None:
    one = [{"prompt": f"One {n}?", "chosen": "Yes.", "answer": n, "of": {"tests": [n, None]}} for n in range(60)]
    other = [{"q": f"Other {n}?", "a": f"{n}", "level": 0.5} for n in range(60)]
    spec = rewarded(
        write(tmp_path / "a.jsonl", one),
        write(tmp_path / "b.jsonl", other, columns={"prompt": "q", "chosen": "a", "answer": "a"}),
    )
    data = prepare(spec, "ppo", tiny.tokenizer(), tmp_path / "data", world)
    expected = {f"One {n}?": (n, {"tests": [n, None]}, None) for n in range(60)}
    expected |= {f"Other {n}?": (f"{n}", None, 0.5) for n in range(60)}
    for part in (data.train, data.held_out):
        rows = list(part)
        columns = columns_of(rows)
        assert list(columns) == ["prompt", "answer", "level", "of"]
        asked = [text.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:") for text in columns["prompt"]]
        assert list(zip(columns["answer"], columns["of"], columns["level"], strict=True)) == [
            expected[question] for question in asked
        ]
    assert columns_of([]) == {}


def test_rewards_get_the_dialogue_and_not_a_column_of_its_name(tmp_path: Path, world: World) -> None:
    rows = [{"prompt": "bare", "messages": [user(f"Hi {n}?"), assistant("Yes.")], "answer": n} for n in range(40)]
    spec = rewarded({**write(tmp_path / "a.jsonl", rows), "format": "messages"})
    (row, *_) = prepare(spec, "ppo", tiny.tokenizer(), tmp_path / "data", world).train
    columns = columns_of([row])
    assert columns == {"prompt": [f"\n\nHuman: Hi {columns['answer'][0]}?\n\nAssistant:"], "answer": columns["answer"]}


def test_cells_that_json_cannot_hold_are_left_out_and_dates_become_text(tmp_path: Path, world: World) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 40
    columns = {
        "prompt": [f"Q{n}?" for n in range(count)], "chosen": ["Yes."] * count, "picture": [b"x"] * count,
        "day": [datetime.date(2026, 1, 31)] * count, "price": [Decimal("1.50")] * count,
        "score": [float("nan")] * count,
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    spec = rewarded({"path": str(tmp_path / "a.parquet"), "format": PAIR})
    row = prepare(spec, "ppo", tiny.tokenizer(), tmp_path / "data", world).train[0]
    assert row["columns"] == {"day": "2026-01-31", "price": "1.50", "score": None}


def test_without_rewards_the_tokens_of_earlier_versions_are_found(tmp_path: Path, world: World) -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes.", "answer": n} for n in range(60)]
    source = write(tmp_path / "a.jsonl", rows)
    spec, folder = spec_of(source, stages=("sft", "ppo")), tmp_path / "data"
    data = prepare(spec, "ppo", tiny.tokenizer(), folder, world)
    assert set(data.train[0]) == {"prompt", "prompt_ids", "chosen_ids"}
    assert columns_of([data.train[0]]) == {}
    prepare(rewarded(source), "ppo", tiny.tokenizer(), folder, world)
    assert len(list(folder.iterdir())) == 2
    mixed = prepare_mixture(spec.data.sources[0], "ptx", rewarded(source), tiny.tokenizer(), folder, world)
    assert "columns" not in mixed[0]


def test_a_name_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    spec = spec_of(write(tmp_path / "a.jsonl", [], columns={"promt": "question"}), stages=("sft",))
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude={"stages"}) | {"stages": {"sft": {}}}))
    with pytest.raises(SpecError, match="has promt, which the format prompt-chosen-rejected does not read") as caught:
        load_spec(path)
    (problem,) = caught.value.problems
    assert problem.path == "data.sources.0.columns"
