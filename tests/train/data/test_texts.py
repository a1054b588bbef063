"""Pretraining text: every token is learned once, the tokens on disk survive kills, and damage is found."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.row_counts import Outcome, SourceCounts, read_counts
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import PretrainSpec
from hpc_rlhf.train.data import common_lines, documents, repeats, text_parts, texts, token_files
from hpc_rlhf.train.data.sequences import Sequences
from hpc_rlhf.train.data.token_files import TokenStream
from hpc_rlhf.train.runtime.alone import Alone
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled
from tests.train import tiny

WORLD: Any = Alone()
WORDS = ["Snow", "is", "white,", "grass", "green", "and", "a", "raven", "black;", "</s>", "no", "end."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments, batches and parts of few documents."""
    monkeypatch.setattr(token_files, "SEGMENT", 300)
    monkeypatch.setattr(text_parts, "BATCH", 100)
    monkeypatch.setattr(documents, "PART_BYTES", 2000)


def corpus(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(count)]


def write_shards(folder: Path, lines: list[str], shards: int) -> None:
    folder.mkdir()
    for number in range(shards):
        write_again(folder / f"{number}.jsonl", lines[number::shards])


def write_again(path: Path, lines: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))


def prepare(folder: Path, tokenizer: Any, *sources: SourceSpec, **fields: Any) -> list[tuple[TokenStream, TokenStream]]:
    return texts.prepare(PretrainSpec(sources=sources, **{"held_out": 0.2, **fields}), 7, tokenizer, folder, WORLD)


def text_source(path: Path, **fields: Any) -> SourceSpec:
    return SourceSpec(path=str(path), format="text", **fields)


def documents_of(stream: TokenStream) -> list[list[int]]:
    ids, lengths = stream.read(0, len(stream))
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(stream) else []


@pytest.mark.usefixtures("small")
def test_all_documents_are_kept_in_order_and_equal_ones_together(tmp_path: Path, tokenizer: Any) -> None:
    lines = corpus(0, 120)
    write_shards(tmp_path / "data", lines + lines[:60], 3)
    ((train, held_out),) = prepare(tmp_path / "cache", tokenizer, text_source(tmp_path / "data"))
    expected = [
        [tiny.BOS, *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], tiny.EOS]
        for number in range(3)
        for text in (lines + lines[:60])[number::3]
    ]
    learned, held = documents_of(train), documents_of(held_out)
    assert learned == [ids for ids in expected if ids not in held]
    assert held == [ids for ids in expected if ids in held]
    assert 0.05 < len(held) / 180 < 0.4
    assert all(ids.count(tiny.EOS) == 1 for ids in learned), "the string of EOS in a text is text"
    assert len(train.segments) > 5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("length", [8, 37])
def test_sequences_learn_every_token_but_the_first_of_each_document_once(
    tmp_path: Path, tokenizer: Any, length: int
) -> None:
    write_shards(tmp_path / "one", corpus(1, 60), 2)
    write_shards(tmp_path / "two", corpus(2, 40), 1)
    streams = prepare(tmp_path / "cache", tokenizer, text_source(tmp_path / "one"), text_source(tmp_path / "two"))
    train = [train for train, _ in streams]
    rows = Sequences(train, length, cross=False)
    for source, stream in enumerate(train):
        own = [rows[i] for i in range(len(rows)) if rows[i]["source"] == source]
        whole = stream.read(0, len(stream))[0]
        assert all(len(row["ids"]) == length for row in own[:-1])
        assert np.array_equal(np.concatenate([own[0]["ids"], *(row["ids"][1:] for row in own[1:])]), whole)
        predicted = sum(len(row["ids"]) - len(row["documents"]) for row in own)
        assert predicted == len(whole) - len(documents_of(stream))
    assert [rows.length(i) for i in range(len(rows))] == [len(rows[i]["ids"]) for i in range(len(rows))]
    across = Sequences(train, length, cross=True)
    assert all(across[i]["documents"] == [len(rows[i]["ids"])] for i in range(len(rows)))


@pytest.mark.usefixtures("small")
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [text for text in corpus(3, 30) if '"' not in text]
    rows = [{"body": text} for text in lines]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("body\n" + "".join(f'"{text}"\n' for text in lines))
    names, columns = ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv"), {"text": "body"}
    found = prepare(tmp_path / "x", tokenizer, *(text_source(tmp_path / name, columns=columns) for name in names))
    assert all(documents_of(each[0]) == documents_of(found[0][0]) for each in found)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(lines):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    ((train, _),) = prepare(tmp_path / "y", tokenizer, text_source(tmp_path / "texts"))
    assert documents_of(train) == documents_of(found[0][0])


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [f"{path.relative_to(folder)}".encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


@pytest.mark.slow
def test_tokens_are_the_same_however_often_the_process_was_killed(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path / "data", corpus(4, 3000), 4)
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.train.data.lone"]
        return subprocess.Popen([*command, *map(str, (tmp_path / "data", tmp_path / "tokenizer", folder))])

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    segments = len(list(whole.glob("*/*.tokens")))
    draw, kills = random.Random(5), 0
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        process = start(killed)
        while process.poll() is None and len(list(killed.glob("*/*.tokens"))) < share * segments:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.02)
        process.kill()
        kills += process.wait() != 0
    assert kills >= 3
    assert start(killed).wait() == 0
    assert digest(killed) == digest(whole)


@pytest.mark.usefixtures("small")
def test_a_stop_keeps_what_is_complete(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path / "data", corpus(6, 300), 2)
    source, polls = text_source(tmp_path / "data"), iter([False] * 12 + [True])
    spec = PretrainSpec(sources=(source,), held_out=0.2)
    with pytest.raises(WorkCancelled):
        texts.prepare(spec, 7, tokenizer, tmp_path / "a", WORLD, lambda: next(polls))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*/*.tokens")}
    assert kept
    prepare(tmp_path / "a", tokenizer, source)
    prepare(tmp_path / "b", tokenizer, source)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


@pytest.mark.usefixtures("small")
def test_damaged_tokens_are_written_again(tmp_path: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "data", corpus(8, 300), 2)
    prepare(tmp_path / "cache", tokenizer, text_source(tmp_path / "data"))
    before = digest(tmp_path / "cache")
    (damaged,) = (tmp_path / "cache").glob("*/part-00001-00002.tokens")
    content = bytearray(damaged.read_bytes())
    content[5] ^= 1
    damaged.write_bytes(content)
    prepare(tmp_path / "cache", tokenizer, text_source(tmp_path / "data"))
    assert digest(tmp_path / "cache") == before
    assert "part-00001-00002.tokens differs from its SHA-256" in capfd.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_broken_shard_is_an_error_with_file_and_line(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path / "data", corpus(9, 90), 3)
    shard = tmp_path / "data" / "1.jsonl"
    rows = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join([*rows[:11], '{"text": "half a', *rows[12:]]))
    with pytest.raises(HpcRlhfError) as caught:
        prepare(tmp_path / "cache", tokenizer, text_source(tmp_path / "data"))
    assert f"{shard}:12" in str(caught.value.where)
    shard.write_text("".join(rows))
    prepare(tmp_path / "cache", tokenizer, text_source(tmp_path / "data"))  # a file of another size may be read anew


def counts_in(folder: Path) -> list[SourceCounts]:
    return [counts for path in folder.glob("text-*") for counts in read_counts(manifest.read(path) or {})]


@pytest.mark.usefixtures("small")
def test_repeated_documents_are_left_out_whatever_part_they_are_in(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "COMPARED", 20)
    draw, lines = random.Random(10), corpus(10, 60)
    write_shards(tmp_path / "data", draw.choices(lines, k=150), 3)
    source = text_source(tmp_path / "data")
    ((train, held_out),) = prepare(tmp_path / "once", tokenizer, source, deduplicate=True)
    ((all_train, all_held_out),) = prepare(tmp_path / "all", tokenizer, source)
    for own, whole in ((train, all_train), (held_out, all_held_out)):
        ids = documents_of(whole)
        assert documents_of(own) == [each for n, each in enumerate(ids) if each not in ids[:n]]
    (counts,) = counts_in(tmp_path / "once")
    left_out = 150 - len(documents_of(train)) - len(documents_of(held_out))
    assert f"{left_out} equal to an earlier one" in counts.summary()
    # The first shard no longer has what the others repeat.
    shards = [tmp_path / "data" / f"{n}.jsonl" for n in range(3)]
    (counts,) = counts_in(tmp_path / "once")
    next((tmp_path / "once").glob("*/manifest.json")).unlink()
    write_again(shards[0], ["Only this."])
    ((train, held_out),) = prepare(tmp_path / "once", tokenizer, source, deduplicate=True)
    rest = {json.loads(row)["text"] for shard in shards for row in shard.read_text().splitlines()}
    assert len(documents_of(train)) + len(documents_of(held_out)) == len(rest)


@pytest.mark.usefixtures("small")
def test_a_document_of_several_sources_is_kept_in_the_first(tmp_path: Path, tokenizer: Any) -> None:
    lines = corpus(11, 90)
    write_shards(tmp_path / "one", lines[:60], 2)
    write_shards(tmp_path / "two", lines[30:], 2)
    sources = [text_source(tmp_path / name) for name in ("one", "two")]
    kept, whole = (prepare(tmp_path / f"{again}", tokenizer, *sources, deduplicate=again) for again in (True, False))
    assert list(map(documents_of, kept[0])) == list(map(documents_of, whole[0]))
    first = [ids for stream in whole[0] for ids in documents_of(stream)]
    for own, before in zip(kept[1], whole[1], strict=True):
        assert documents_of(own) == [ids for ids in documents_of(before) if ids not in first]
    # What the second source lacks changes if the first one does before all is complete.
    for path in (tmp_path / "True").glob("text-1-*/manifest.json"):
        path.unlink()
    write_again(tmp_path / "one" / "0.jsonl", lines[1:60:2])
    again = prepare(tmp_path / "True", tokenizer, *sources, deduplicate=True)
    fresh = prepare(tmp_path / "fresh", tokenizer, *sources, deduplicate=True)
    assert [documents_of(own) for own in again[1]] == [documents_of(own) for own in fresh[1]]
    assert sum(map(len, again[1])) > sum(map(len, kept[1]))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("deduplicate", [False, True])
def test_lines_that_too_many_documents_have_are_left_out_of_all(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, deduplicate: bool
) -> None:
    monkeypatch.setattr(common_lines, "COMPARED", 7)
    draw = random.Random(12)
    lines = [f"Line {n}." for n in range(60)]
    rows = [" \n".join(draw.choices(lines, k=draw.randint(1, 6))) + "\n\n  Menu " for _ in range(90)]
    rows += [rows[4], "Menu", *["Line 7.\nMenu"] * 3]
    write_shards(tmp_path / "one", rows[:50], 2)
    write_shards(tmp_path / "two", rows[50:], 1)
    shown = [rows[0:50:2], rows[1:50:2], rows[50:]]
    ordered = [text.strip() for part in shown for text in part]
    counted = list(dict.fromkeys(ordered)) if deduplicate else ordered
    have = Counter(line for text in counted for line in {line.strip() for line in text.split("\n")} - {""})

    def kept(text: str) -> str:
        return "\n".join(line for line in text.split("\n") if have[line.strip()] <= 3).strip("\n")

    sources = [text_source(tmp_path / name) for name in ("one", "two")]
    streams = prepare(
        tmp_path / "cache", tokenizer, *sources, held_out=0.0, deduplicate=deduplicate, max_line_documents=3
    )
    learned = [tokenizer.decode(ids[1:-1]) for train, _ in streams for ids in documents_of(train)]
    assert learned == [text for text in map(kept, counted) if text.strip()]
    assert "Menu" not in "".join(learned)
    assert 0 < len(learned) < len(counted)
    counts = SourceCounts.total(sorted(counts_in(tmp_path / "cache"), key=lambda one: one.source))
    assert counts.outcomes[Outcome.COMMON_LINES].rows == len(counted) - len(learned)
    removed = [sum(have[line.strip()] > 3 for line in text.split("\n")) for text in counted if kept(text).strip()]
    assert (counts.outcomes[Outcome.WITHOUT_LINES].rows, counts.lines) == (sum(map(bool, removed)), sum(removed))
    assert not counts.warnings()
    assert not list((tmp_path / "cache").rglob("*-lines")), "only the common ones are kept"


def test_filters_count_what_they_leave_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = {
        "short": "Snow.",
        "long": " ".join(f"{n}th" for n in range(400)),
        "symbols": "+-+-+ a b ***** //// ==== ;;;; ()()()",
        "lines": "one line\nanother one\none line\none line\none line",
        "repeats": "snow and grass " * 60,
        "kept": "雪は白く、草は緑である。 Snow is white, and grass is green in the morning.",
    }
    write_shards(tmp_path / "data", list(rows.values()), 1)
    filters = {
        "min_characters": 10, "max_characters": 1000, "min_letters": 0.6, "max_repeated": 0.3, "max_compression": 8.0,
    }  # fmt: skip
    ((train, _),) = prepare(
        tmp_path / "cache", tokenizer, text_source(tmp_path / "data"), held_out=0.0, filters=filters
    )
    (kept,) = documents_of(train)
    assert tokenizer.decode(kept[1:-1]) == rows["kept"]
    (counts,) = counts_in(tmp_path / "cache")
    assert {outcome.name: count.rows for outcome, count in counts.outcomes.items()} == {
        "TOO_FEW_CHARACTERS": 1, "TOO_MANY_CHARACTERS": 1, "FEW_LETTERS": 1, "REPEATED_LINES": 1, "COMPRESSIBLE": 1,
        "TRAINED": 1,
    }  # fmt: skip
