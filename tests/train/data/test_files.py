"""Data files: their rows are those that datasets reads, and what cannot be read is one error with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data.files import read_rows

ROW = {"prompt": "Why?", "chosen": "Because."}
LINE = json.dumps(ROW)
WORDS = ("None", "", " indented", "two\nlines", 'a "quote"', "comma, here", "naïve", "日本", "tab\there", "\u2028", "7")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


def error_of(path: Path) -> HpcRlhfError:
    with pytest.raises(HpcRlhfError) as caught:
        rows_of(path)
    assert caught.value.exit_code == 2
    return caught.value


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_array(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write", "nested"),
    [
        ("a.csv", write_csv, False),
        ("a.jsonl", write_lines, True),
        ("a.json", write_array, True),
        ("a.parquet", write_table, True),
    ],
)
def test_rows_are_those_that_datasets_reads(
    name: str, write: Callable[..., None], nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that datasets read the data for go on with the same rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draw = random.Random(name)
    rows: list[dict[str, Any]] = []
    for _ in range(600):
        row: dict[str, Any] = {column: draw.choice(WORDS) for column in ("prompt", "chosen", "rejected")}
        if nested:
            row["rejected"] = draw.choice([None, row["rejected"]])
            row["messages"] = [
                {"role": draw.choice(["user", "assistant"]), "content": draw.choice(WORDS)}
                for _ in range(draw.randrange(3))
            ]
        rows.append(row)
    write(tmp_path / name, rows)
    options: dict[str, Any] = {}
    if name.endswith("csv"):
        text = datasets.Value("string")
        options = {"features": datasets.Features(dict.fromkeys(rows[0], text)), "keep_default_na": False}
    kind = {"jsonl": "json"}.get(name[2:], name[2:])
    theirs = datasets.load_dataset(kind, data_files=str(tmp_path / name), split="train", **options)
    assert rows_of(tmp_path / name) == list(theirs) == rows


def test_a_column_that_some_rows_lack_is_null_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}, {"chosen": "b"}])
    assert rows_of(tmp_path / "a.jsonl") == [{"prompt": "a", "chosen": None}, {"prompt": None, "chosen": "b"}]
    (tmp_path / "a.csv").write_text("prompt,chosen\n\na\n  \nb,c\n")
    assert rows_of(tmp_path / "a.csv") == [{"prompt": "a", "chosen": None}, {"prompt": "b", "chosen": "c"}]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL.xz", "a.csv.bz2", "a.parquet.gz"])
def test_compression_is_recognized_by_content(name: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    plain = tmp_path / name.lower().rsplit(".", 1)[0] if name.count(".") > 1 else tmp_path / name
    {".csv": write_csv, ".parquet": write_table}.get(plain.suffix, write_lines)(plain, [ROW, ROW])
    content = plain.read_bytes()
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == [ROW, ROW], "not compressed in spite of its name"
    (tmp_path / name).write_bytes(compress(content))
    assert rows_of(tmp_path / name) == [ROW, ROW]
    (tmp_path / name).write_bytes(compress(content)[:-9])
    assert "cannot be read" in str(error_of(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_marked_encoding_is_read(name: str, encoding: str, tmp_path: Path) -> None:
    row = {"prompt": "naïve?", "chosen": "日本"}
    {"a.csv": write_csv, "a.json": write_array}.get(name, write_lines)(tmp_path / name, [row])
    text = (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert rows_of(tmp_path / name) == [row]


@pytest.mark.parametrize(
    ("name", "content", "place", "words"),
    [
        ("a.jsonl", f'{LINE}\n{{"prompt": "caf\xe9"}}\n'.encode("latin-1"), ":2:16", "the byte 0xe9 is not UTF-8"),
        ("a.csv", "prompt,chosen\na,b\nc,caf\xe9\n".encode("latin-1"), ":3:6", "the byte 0xe9 is not UTF-8"),
        ("a.jsonl", f'{LINE}\n{{"prompt": "\\ud83d!"}}\n'.encode(), ":2:13", "half a character"),
        ("a.json", b'[{"prompt": "\\udc00"}]', ", row 0:13", "half a character"),
        ("a.jsonl", LINE.encode("utf-16-le"), ":1:2", "NUL bytes"),
        ("a.jsonl", f"{LINE}\n".encode() + b"\0" * 64, ":2:1", "NUL bytes"),
        ("a.jsonl", f"{LINE}\n[1]\n".encode(), ":2", "not a JSON object: '[1]'"),
        ("a.jsonl", f"{LINE}\n{LINE}{LINE}\n".encode(), f":2:{len(LINE) + 1}", "Extra data"),
        ("a.jsonl", f'{LINE}\n{{"a": {"[" * 100_000}\n'.encode(), ":2", "recursion"),
        ("a.jsonl", f'{LINE}\n{{"a": {"9" * 5000}}}\n'.encode(), ":2", "limit"),
        ("a.json", f"[{LINE},\n{LINE}\n{LINE}]".encode(), ":3:1", "Expecting ',' or ']'"),
        ("a.json", f"[{LINE},\n{LINE}] x".encode(), f":2:{len(LINE) + 2}", "Expecting the end"),
        ("a.json", b'{"prompt": "a",\n "chosen"', ":2:10", "Expecting ':'"),
        ("a.csv", b"prompt,chosen\na,b,c\n", ":2", "the row has 3 cells and the header 2"),
        ("a.csv", b'prompt,chosen\na,b\nc,"d\n', ":3", "unexpected end of data"),
        ("a.csv", b'prompt,chosen\na,"say "hi" to"\n', ":2", "expected after"),
        ("a.csv", b"prompt,chosen,chosen\na,b,c\n", ":1", "'chosen' twice"),
        ("a.jsonl", b"", "", "empty"),
        ("a.parquet", b"PAR1 and no more", "", "cannot be read"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd rest", "", "zstandard"),
        ("a.xlsx", b"PK", "", "does not show what kind"),
    ],
)
def test_what_cannot_be_read_is_one_error_with_its_place(
    name: str, content: bytes, place: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_rlhf.train.data.text_lines.find_spec", lambda name: None)
    (tmp_path / name).write_bytes(content)
    error = error_of(tmp_path / name)
    assert (error.where, words in error.message) == (f"{tmp_path / name}{place}", True), error


def test_a_cut_parquet_file_and_text_that_is_not_utf8_in_one(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    write_table(path, [ROW] * 5)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read" in error_of(path).message
    binary = pa.array([b"a", b"b", b"caf\xe9"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"prompt": column}), path)
    assert error_of(path).message == "the column prompt is not UTF-8 in row 2"


def test_rows_are_read_one_after_the_other(tmp_path: Path) -> None:
    """An error far behind does not keep the first rows from being read."""
    for name, text in (("a.csv", "prompt,chosen\n" + "a,b\n" * 3000), ("a.jsonl", f"{LINE}\n" * 3000)):
        (tmp_path / name).write_text(text + '"')
        rows = read_rows(tmp_path / name)
        assert next(rows)[0] == f"{tmp_path / name}:{2 if name == 'a.csv' else 1}"
