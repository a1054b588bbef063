"""Every row of the data is used in a stage, or counted there under a reason with the first row's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.row_counts import Outcome, read_counts
from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny
from tests.train.data.specs import spec_of

HI = "\n\nHuman: Question {}?\n\nAssistant:"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def counted(rows: list[dict[str, Any]], stage: str, world: World, tokenizer: Any, folder: Path, **data: Any) -> Any:
    """The counts of a stage that has all rows for itself, as stored."""
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "a.jsonl"), "format": "hh", **data.pop("source", {})}
    split = {name: float(name == stage) for name in ("sft", "reward", "ppo")}
    prepare(spec_of(source, split=split, **data), stage, tokenizer, folder / "data", world)
    (stored,) = (folder / "data").iterdir()
    (counts,) = read_counts(manifest.read(stored) or {})
    assert counts.read == len(rows)
    return {outcome: (count.rows, count.first) for outcome, count in counts.outcomes.items()}


def pair(number: int, chosen: str = " Yes.", rejected: str | None = " No.", other: int | None = None) -> dict[str, Any]:
    prompt, rejected_prompt = HI.format(number), HI.format(number if other is None else other)
    return {"chosen": prompt + chosen, "rejected": None if rejected is None else rejected_prompt + rejected}


BROKEN = [
    pair(100, chosen=" Yes.\n\nHuman: thanks"),
    pair(101, rejected=" Yes."),
    pair(102, other=103),
    pair(104, rejected=None),
    {"chosen": None, "rejected": None},
    pair(105, chosen=" "),
]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_each_reason_is_counted_with_its_first_row(stage: str, world: World, tokenizer: Any, tmp_path: Path) -> None:
    rows = [*[pair(n) for n in range(20)], *BROKEN, *BROKEN]
    counts = counted(rows, stage, world, tokenizer, tmp_path, held_out=0.3)
    where = f"{tmp_path}/a.jsonl"
    assert counts[Outcome.USER_LAST] == (2, f"{where}:21")
    assert counts[Outcome.NULL] == (2, f"{where}:25")
    assert counts[Outcome.NO_ANSWER] == (2, f"{where}:26")
    if stage == "reward":
        assert counts[Outcome.SAME_ANSWERS] == (2, f"{where}:22")
        assert counts[Outcome.PROMPTS_DIFFER] == (2, f"{where}:23")
        assert counts[Outcome.NO_REJECTED] == (2, f"{where}:24")
    twice = counts.get(Outcome.HELD_OUT_TWICE, (0, ""))[0]
    used = counts[Outcome.TRAINED][0] + counts[Outcome.HELD_OUT][0] + twice
    assert used == {"sft": 26, "reward": 20, "ppo": 23}[stage]
    assert counts.get(Outcome.REPEATED, (0, ""))[0] == (3 if stage == "ppo" else 0)


@pytest.mark.parametrize("weight", [0.5, 2.0, 2.5])
def test_a_weight_counts_rows_and_not_their_copies(weight: float, world: World, tokenizer: Any, tmp_path: Path) -> None:
    for stage in ("sft", "ppo"):
        folder = tmp_path / stage
        folder.mkdir()
        counts = counted([pair(n) for n in range(40)], stage, world, tokenizer, folder, source={"weight": weight})
        assert (Outcome.NOT_DRAWN in counts) == (weight < 1)
        assert Outcome.REPEATED not in counts


def test_what_is_cut_or_too_long_is_counted(world: World, tokenizer: Any, tmp_path: Path) -> None:
    rows = [pair(n) for n in range(9)] + [pair(9, chosen=" long" * 40), pair("?" * 99, rejected=" r" * 50)]  # type: ignore[arg-type]
    limits = {"max_prompt_tokens": 60, "max_answer_tokens": 20, "held_out": 0}
    for stage in ("sft", "reward", "ppo"):
        folder = tmp_path / stage
        folder.mkdir()
        counts = counted(rows, stage, world, tokenizer, folder, **limits)
        where = f"{folder}/a.jsonl"
        assert counts[Outcome.CUT_RIGHT] == (2 if stage == "reward" else 1, f"{where}:10")
        assert counts[Outcome.TOO_LONG if stage == "ppo" else Outcome.CUT_LEFT] == (1, f"{where}:11")
        assert counts[Outcome.TRAINED][0] == (10 if stage == "ppo" else 11)


def test_lost_rows_are_in_the_log_and_too_many_are_an_error(
    world: World, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*[pair(n) for n in range(18)], *BROKEN[:2]]
    counted(rows, "reward", world, tokenizer, tmp_path)
    out, err = capsys.readouterr()
    where = f"{tmp_path}/a.jsonl"
    assert f"data of stage reward: {where}: 20 rows: " in out
    lost = f"1 that end with the user's turn (first: {where}:19), 1 with the same response twice (first: {where}:20)"
    assert lost in out
    assert f"warning: stage reward: 10% of the rows of {where} are left out: {lost}" in err

    with pytest.raises(HpcRlhfError, match=r"10\.0% of the rows of .* and data\.max_dropped is 0\.05") as caught:
        counted(rows, "reward", world, tokenizer, tmp_path, max_dropped=0.05)
    assert caught.value.exit_code == 2, "and is not tried again"
    counted(rows, "reward", world, tokenizer, tmp_path, max_dropped=0.11)
    assert len(list((tmp_path / "data").iterdir())) == 1, "the limit is no reason to tokenize again"


def test_data_without_anything_for_a_stage_says_where_the_rows_went(
    world: World, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(HpcRlhfError, match="no pairs of responses") as caught:
        counted([pair(n, other=n + 1) for n in range(5)], "reward", world, tokenizer, tmp_path)
    assert f"5 with a different prompt for each response (first: {tmp_path}/a.jsonl:1)" in caught.value.message
    assert caught.value.exit_code == 2
