"""Sources: files are read, prompts never leak between stages, and weights apply."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf import intervals
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sizes import EVALUATED_ROWS
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.train.data import sources
from hpc_rlhf.train.data.rows import Sample
from hpc_rlhf.train.data.sources import is_held_out, read, stage_of, stage_samples, texts
from hpc_rlhf.train.stages.learner import evaluated_rows
from tests.train.data.specs import spec_of

STAGES = ("sft", "reward", "ppo")
HH = Path(__file__).parents[4] / "shared" / "data" / "hh-rlhf" / "harmless-base.jsonl.gz"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of datasets out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pair(number: int, answer: str = "yes") -> dict[str, str]:
    return {"prompt": f"Question {number}?", "chosen": answer, "rejected": f"not {answer}"}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def source(path: str | Path, **fields: Any) -> dict[str, Any]:
    return {"path": str(path), "format": "prompt-chosen-rejected", **fields}


def split(spec: JobSpec, stage: str) -> tuple[list[Sample], list[Sample]]:
    """A stage's training samples and held-out samples."""
    samples = list(stage_samples(spec, stage))
    return [each.sample for each in samples if not each.held_out], [each.sample for each in samples if each.held_out]


def all_samples(spec: JobSpec) -> dict[tuple[str, str], list[Sample]]:
    found = {}
    for stage in spec.stage_names:
        found[stage, "train"], found[stage, "held out"] = split(spec, stage)
    return found


# Files


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets

    rows = [pair(number) for number in range(4)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl.gz", rows)
    (tmp_path / "c.json").write_text(json.dumps(rows))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "e.parquet"))
    folder = tmp_path / "f"
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", rows[:1])
    write_jsonl(folder / "2.jsonl", rows[1:])
    (folder / "README.md").write_text("not data")

    expected = [
        Sample((("human", f"Question {n}?"),), f"\n\nHuman: Question {n}?\n\nAssistant:", " yes", " not yes")
        for n in range(4)
    ]
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.csv", "e.parquet", "f"):
        assert list(read(SourceSpec.model_validate(source(tmp_path / name)), 0)) == expected, name


def test_rows_without_a_response_are_skipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(1), {**pair(2), "chosen": " "}, pair(3)])
    prompts = [sample.prompt for sample in read(SourceSpec.model_validate(source(path)), 0)]
    assert len(prompts) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such data file or folder"),
        ("data.xlsx", "x", "does not show what kind of file it is"),
        ("empty.jsonl", "", "the data file is empty"),
        ("broken.parquet", "PAR1 not", "the file cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(
    tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(HpcRlhfError, match=says) as caught:
        list(read(SourceSpec.model_validate(source(tmp_path / name)), 0))
    assert caught.value.where == str(tmp_path / name)


def test_a_csv_cell_is_text(tmp_path: Path) -> None:
    """pandas takes some words for missing values, and numbers and dates for what they look like."""
    answers = ["None", "NA", "null", "nan", "007", "1e3", "2026-01-31", "True", "two\nlines", '"quoted"']
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerows([f"Question {n}?", answer, ""] for n, answer in enumerate(answers))
    samples = list(read(SourceSpec.model_validate(source(tmp_path / "d.csv")), 0))
    assert [sample.chosen for sample in samples] == [f" {answer}" for answer in answers]
    assert {sample.rejected for sample in samples} == {""}


def test_a_zst_file_without_zstandard_says_so(tmp_path: Path) -> None:
    if importlib.util.find_spec("zstandard") is not None:
        pytest.skip("zstandard is installed")
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(HpcRlhfError, match="needs the package zstandard") as caught:
        list(read(SourceSpec.model_validate(source(tmp_path / "a.jsonl.zst")), 0))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_an_invalid_line_is_reported_with_its_number(tmp_path: Path, name: str) -> None:
    text = json.dumps(pair(1)) + '\n\n{"prompt": "a", "cho\n' + json.dumps(pair(2)) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    with pytest.raises(HpcRlhfError, match="the line is not a JSON object") as caught:
        list(read(SourceSpec.model_validate(source(tmp_path / name)), 0))
    assert (caught.value.where, caught.value.exit_code) == (f"{tmp_path / name}:3:21", 2)


def test_an_invalid_row_is_reported_with_file_and_number(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(HpcRlhfError) as caught:
        list(read(SourceSpec.model_validate(source(path)), 0))
    assert caught.value.where == f"{path}:1"


def test_hh_transcripts_are_read_completely() -> None:
    if not HH.exists():
        pytest.skip(f"no HH-RLHF data at {HH}")
    samples = list(read(SourceSpec.model_validate({"path": str(HH), "format": "hh"}), 0))
    pairs = [sample for sample in samples if sample.rejected]
    assert len(samples) > 1700
    assert len(pairs) > 1700
    for sample in samples:
        assert sample.prompt.startswith("\n\nHuman:")
        assert sample.prompt.endswith("\n\nAssistant:")
        assert "\n\nAssistant:" not in sample.chosen
        assert sample.chosen.startswith(" ")


# The split


def test_no_prompt_is_in_two_stages_or_in_both_splits(tmp_path: Path) -> None:
    """Prompts occur twice within a source, and again in another."""
    first = write_jsonl(tmp_path / "a.jsonl", [pair(n % 150, f"a{n}") for n in range(300)])
    second = write_jsonl(tmp_path / "b.jsonl", [pair(n, "b") for n in range(100, 250)])
    parts = all_samples(spec_of(source(first), source(second, weight=2.0), held_out=0.2))
    prompts = {name: {sample.prompt for sample in samples} for name, samples in parts.items()}
    assert all(prompts.values())
    for name, mine in prompts.items():
        for other, theirs in prompts.items():
            assert name == other or not mine & theirs, (name, other)
    assert len(set().union(*prompts.values())) == 250

    rows = Counter(sample.prompt for samples in parts.values() for sample in samples if sample.chosen)
    in_sft = next(iter(prompts["sft", "train"] & {f"\n\nHuman: Question {n}?\n\nAssistant:" for n in range(100, 150)}))
    assert rows[in_sft] == 4, "two rows of the first source, one of weight 2 of the second"


def conversation(number: int, form: str) -> dict[str, Any]:
    """A row of a conversation of three turns that has a row for each of its answers."""
    opening, turn = divmod(number, 3)
    said = [f"Opening {opening}", "Answer 0", "More", "Answer 1", "And more"][: 2 * turn + 1]
    roles = ["user", "assistant", "user", "assistant", "user"]
    chosen, rejected = f"Answer {turn}", "No."
    if form == "prompt-chosen-rejected":
        text = "".join(f"\n\n{'Human' if role == 'user' else 'Assistant'}: {it}" for role, it in zip(roles, said))  # noqa: B905
        return {"prompt": f"{text}\n\nAssistant:", "chosen": f" {chosen}", "rejected": f" {rejected}"}
    turns = [{"role": "system", "content": "Be kind."}] if opening % 2 else []
    turns += [{"role": role, "content": it} for role, it in zip(roles, said)]  # noqa: B905
    return {"chosen": [*turns, {"role": "assistant", "content": chosen}],
            "rejected": [*turns, {"role": "assistant", "content": rejected}]}  # fmt: skip


@pytest.mark.parametrize("form", ["prompt-chosen-rejected", "messages", "hh"])
def test_no_held_out_pair_stands_in_a_training_prompt(tmp_path: Path, form: str) -> None:
    rows = [conversation(n, form if form == "messages" else "prompt-chosen-rejected") for n in range(600)]
    if form == "hh":
        rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(3):
        spec = spec_of(source(path, format=form), held_out=0.3).model_copy(update={"seed": seed})
        parts = all_samples(spec)
        assert all(parts.values())
        for (stage, part), samples in parts.items():
            for sample in samples if part == "held out" else ():
                inside = [
                    name for name, theirs in parts.items() if name[1] == "train" or name[0] != stage
                    for other in theirs if other.prompt.startswith(sample.prompt + sample.chosen + "\n\n")
                ]  # fmt: skip
                assert not inside, (sample.prompt, inside)
        as_before = spec.model_copy(update={"data": spec.data.model_copy(update={"version": 1})})
        assert [s.prompt for s in split(as_before, "sft")[1]] != [s.prompt for s in split(spec, "sft")[1]]


def test_ppo_gets_every_prompt_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(n % 60, f"a{n}") for n in range(240)])
    train, held_out = split(spec_of(source(path), source(path, weight=3.0), held_out=0.3), "ppo")
    prompts = [sample.prompt for sample in train + held_out]
    assert len(prompts) == len(set(prompts)) > 5


def test_the_reward_model_gets_only_pairs_that_differ(tmp_path: Path) -> None:
    rows = [
        pair(n) if n % 3 else {**pair(n), "rejected": None if n % 2 else "yes"} for n in range(120)
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train, held_out = split(spec_of(source(path)), "reward")
    assert train
    assert all(sample.rejected not in ("", sample.chosen) for sample in train + held_out)


def test_prompts_are_divided_by_the_split() -> None:
    spec = spec_of({"demo": 10}, split={"sft": 2, "reward": 3, "ppo": 5}, held_out=0.1)
    counts = Counter(stage_of(f"prompt {n}", spec) for n in range(10_000))
    assert [counts[stage] / 10_000 for stage in STAGES] == pytest.approx([0.2, 0.3, 0.5], abs=0.02)
    kept = [n for n in range(10_000) if is_held_out(f"prompt {n}", spec)]
    assert len(kept) / 10_000 == pytest.approx(0.1, abs=0.01)
    # Whether a prompt is held out does not depend on the stage.
    held = Counter(stage_of(f"prompt {n}", spec) for n in kept)
    assert held["ppo"] / len(kept) == pytest.approx(0.5, abs=0.06)


def test_a_stage_that_does_not_run_gets_no_prompts() -> None:
    spec = spec_of({"demo": 10}, stages=("sft",))
    assert {stage_of(f"prompt {n}", spec) for n in range(500)} == {"sft"}
    none_for_sft = spec_of({"demo": 10}, split={"sft": 0, "reward": 1, "ppo": 1})
    assert {stage_of(f"prompt {n}", none_for_sft) for n in range(500)} == {"reward", "ppo"}


def test_plain_text_is_only_for_fine_tuning(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"Story {n}."} for n in range(60)])
    texts_only = source(path, format="text")
    spec = spec_of(texts_only)
    train, _ = split(spec, "sft")
    assert train
    assert all(sample.prompt == "" for sample in train)
    assert not list(stage_samples(spec, "reward"))
    assert not list(stage_samples(spec, "ppo"))


# Weights


def test_weights_repeat_or_drop_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(n) for n in range(2000)])
    for weight, counts in ((2.0, {2: 2000}), (1.0, {1: 2000})):
        seen = Counter(s.prompt for s in read(SourceSpec.model_validate(source(path, weight=weight)), 5))
        assert Counter(seen.values()) == counts
    half = Counter(s.prompt for s in read(SourceSpec.model_validate(source(path, weight=0.5)), 5))
    assert set(half.values()) == {1}
    assert len(half) == pytest.approx(1000, abs=90)
    more = Counter(s.prompt for s in read(SourceSpec.model_validate(source(path, weight=1.5)), 5))
    assert len(more) == 2000
    assert Counter(more.values())[2] == pytest.approx(1000, abs=90)
    assert {prompt for prompt, times in more.items() if times == 2} == set(half), "drawn by row and seed"
    other = Counter(s.prompt for s in read(SourceSpec.model_validate(source(path, weight=0.5)), 6))
    assert other != half


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_sample_is_held_out_once_whatever_its_weight(tmp_path: Path, stage: str) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [pair(n) for n in range(200)])
    second = write_jsonl(tmp_path / "b.jsonl", [pair(n) for n in range(150, 400)])  # some again
    train, held_out = split(spec_of(source(first, weight=2.0), source(second, weight=1.5), held_out=0.4), stage)
    assert len(held_out) == len({sample.prompt for sample in held_out}) > 20
    assert len(train) > len({sample.prompt for sample in train}), "training repeats rows by their weight"


def test_the_interval_of_a_held_out_share_has_its_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a share of 0.6, on held-out samples of two sources with the weights 2 and 3."""
    chance = random.Random(1)
    spec = spec_of({"demo": 10, "weight": 2.0}, {"demo": 10, "weight": 3.0}, stages=("reward",), held_out=0.4)
    rows: list[dict[str, str]] = []
    monkeypatch.setattr(sources, "placed_rows", lambda *_: ((f"row {row['prompt']}", row) for row in rows))
    covered, trials = 0, 200
    for trial in range(trials):
        rows = [pair(n, "right" if chance.random() < 0.6 else "wrong") for n in range(60 * trial, 60 * trial + 60)]
        held_out = split(spec, "reward")[1]
        interval = intervals.share(sum(sample.chosen == " right" for sample in held_out), len(held_out))
        covered += interval.low <= 0.6 <= interval.high
    assert covered / trials == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_held_out_samples_are_evaluated_from_all_sources(seed: int) -> None:
    """The second of two sources of 1,500 rows each counts as much as the first."""
    places = evaluated_rows(3000, seed)
    assert len(set(places)) == len(places) == EVALUATED_ROWS
    assert sum(place >= 1500 for place in places) / EVALUATED_ROWS == pytest.approx(0.5, abs=0.06)
    assert evaluated_rows(700, seed) == list(range(700))


def test_a_tokenizer_is_trained_on_all_the_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(1), {"prompt": "Q?", "chosen": "A."}])
    assert list(texts(spec_of(source(path)))) == [
        "\n\nHuman: Question 1?\n\nAssistant: yes", " not yes", "\n\nHuman: Q?\n\nAssistant: A.",
    ]  # fmt: skip
