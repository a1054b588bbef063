"""Randomly broken data: every row is used or counted under a reason, or one error names its place, as predicted.

A few files run with the other tests; ``make fuzz`` tries 10,000.
"""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import StageDir
from hpc_rlhf.run.row_counts import stage_counts
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.train import survey
from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny
from tests.train.data.specs import spec_of

FILES, THROUGH_THE_CLI = (10_000, 40) if os.environ.get("HPC_RLHF_FUZZ") else (60, 1)
WORDS = [
    "Yes.", "No.", "", " ", "\n", "naïve 日本 😀", "None", "NA", "1e5", "a" * 900, "</s>", "<s>", "<|im_end|>",
    "{{ x }}", "<think>\nHm.\n</think>\n\nYes.", "<think>", "</think>", "\n\nHuman: hi", "\n\nAssistant:", "\0",
    "\ufdd0", "\ufeff", "\u2028", '"', ",", "    indented", "tab\t",
]  # fmt: skip
ODD: list[Any] = [
    None, True, 0, -1.5, 10**25, "", [], {}, [[]], [None], [{}], {"role": "user"}, ["text"],
    [{"role": "user", "content": None}], [{"role": "tool", "content": "x"}], [{"from": "gpt", "value": "x"}],
    [{"role": 7, "content": "x"}], "[]", '[{"role": "user"}]',
    [{"role": "user", "content": [{"type": "image"}]}], [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    {"a": {"b": [1, {"c": None}]}}, "\ud83d", "half \udc00",
]  # fmt: skip
_LOOP = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
_TAIL = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = [
    None,
    _LOOP + _TAIL,
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + _LOOP + _TAIL,
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
    "{% endif %}{% endfor %}" + _LOOP + _TAIL,
    _LOOP.replace("m.content", "m.content.split('</think>')[-1].strip()")
    + "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
    "{% for m in messages %}{{ m.content[:9] }}{% endfor %}",  # loses text
    "{{ messages[1].content }}",  # fails for a single message
]


def row(format: str, draw: random.Random, shape: int) -> dict[str, Any]:
    """A row of a format, in one of the shapes that it may have."""

    def text() -> str:
        return draw.choice(["Why?", "Because.", f"word {draw.randrange(99)}", *draw.choices(WORDS, k=3)])

    def turns() -> list[dict[str, str]]:
        roles = ["system"] * (draw.random() < 0.2) + ["user", "assistant"] * draw.randrange(1, 3)
        return [{"role": role, "content": text()} for role in roles]

    question = f"Question {draw.randrange(40)}?"
    human = f"\n\nHuman: {question}\n\nAssistant:"
    asked = [{"role": "user", "content": question}]
    answers = [[{"role": "assistant", "content": text()}] for _ in range(2)]
    pairs: list[dict[str, Any]] = [
        {"prompt": question, "chosen": text(), "rejected": text()},
        {"prompt": question, "chosen": draw.random(), "rejected": draw.randrange(9), "margin": draw.random()},
        {"prompt": question},
        {"chosen": f"{question} {text()}", "rejected": f"{question} {text()}"},
        {"prompt": question, "completion": text(), "label": draw.random() < 0.5},
    ]
    chats: list[dict[str, Any]] = [
        {"messages": turns()},
        {"chosen": turns(), "rejected": turns()},
        {"prompt": asked, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": json.dumps(asked), "completion": answers[0], "label": draw.random() < 0.5},
        {"prompt": asked},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": text()}]},
        {"messages": [*asked, {**answers[0][0], "reasoning_content": text()}]},
    ]
    return {
        "prompt-chosen-rejected": lambda: pairs[shape % len(pairs)],
        "hh": lambda: {"chosen": f"{human} {text()}", "rejected": f"{human} {text()}"},
        "messages": lambda: chats[shape % len(chats)],
        "instruction": lambda: {"instruction": question, "input": text(), "output": text(), "history": [[text()] * 2]},
        "text": lambda: {"text": text()},
    }[format]()


def break_rows(rows: list[dict[str, Any]], draw: random.Random) -> None:
    for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
        cells = draw.choice(rows)
        name = draw.choice([*cells, "extra"])
        action = draw.randrange(5)
        if action == 0:
            cells.pop(name, None)
        elif action == 1:
            other = ["Prompt", "answer", "", "messages", "system", "history", "label", "margin", "completion", "prompt"]
            cells[draw.choice(other)] = cells.get(name)
        elif action == 2 and isinstance(cells.get(name), list) and cells[name]:
            message = draw.choice(cells[name])
            if isinstance(message, dict):
                message[draw.choice(["role", "content", "tool_calls", "reasoning", "weight"])] = draw.choice(ODD)
        elif action == 3:
            for other in rows:
                other.pop(name, None)
        else:
            cells[name] = copy.deepcopy(draw.choice([*ODD, *WORDS]))


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(cells) + "\n" for cells in rows).encode()


def as_array(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({name for cells in rows for name in cells}))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa

    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


CONTAINERS: list[tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = [
    ("a.jsonl", as_lines), ("a.jsonl", as_lines), ("a.json", as_array), ("a.json", as_lines), ("a.csv", as_csv),
    ("a.parquet", as_parquet), ("a.arrow", as_arrow),
]  # fmt: skip
COMPRESSIONS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("", bytes), ("", bytes), ("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
    (".gz", bytes), ("", gzip.compress), ("", bytes), ("", bytes),
    (".zst", lambda content: b"\x28\xb5\x2f\xfd" + content),
]  # fmt: skip


def break_bytes(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return draw.choice([
        lambda: content[:place],
        lambda: content[:place] + bytes([draw.randrange(256)]) + content[place:],
        lambda: content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :],
        lambda: content[:place] + b"\0" * 9 + content[place:],
        lambda: content + b"\0" * 64,
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: content.decode("utf-8", "replace").encode("latin-1", "replace"),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\n\n"),
        lambda: content.rstrip(b"\n"),
        lambda: content + content,
        lambda: b"",
    ])()  # fmt: skip


def make_source(folder: Path, draw: random.Random) -> tuple[dict[str, Any], int | None]:
    """A source with mutated files below the folder, and its number of rows if no bytes were broken."""
    format = draw.choice(["prompt-chosen-rejected", "prompt-chosen-rejected", "hh", "messages", "instruction", "text"])
    shape = draw.randrange(100)
    rows = [row(format, draw, shape) for _ in range(draw.randrange(1, 30))]
    columns = {name: f"the {name}" for name in rows[0] if draw.random() < 0.1}
    rows = [{columns.get(name, name): cell for name, cell in cells.items()} for cells in rows]
    break_rows(rows, draw)
    name, write = draw.choice(CONTAINERS)
    ending, compress = draw.choice(COMPRESSIONS)
    shards = draw.choice([1, 1, 1, 2, 3])
    several = shards > 1 or draw.random() < 0.1
    total: int | None = 0
    for shard in range(shards):
        part = rows[shard::shards]
        try:
            content = write(part)
        except (ValueError, TypeError, OverflowError, NotImplementedError):  # types that no column can have
            name, content = "a.jsonl", as_lines(part)
        if draw.random() < 0.15:
            content, total = break_bytes(content, draw), None
        content = compress(content)
        if draw.random() < 0.05:
            content, total = break_bytes(content, draw), None
        place = folder / draw.choice(["data", "train", "data/deep"]) if several else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{shard}-{name}{ending}").write_bytes(content)
        total = None if total is None or several or not all(part) else total + len(part)
        path = folder if several else place / f"{shard}-{name}{ending}"
    if several:
        for other in draw.sample(["README.md", "dataset_infos.json", "test.jsonl", ".hidden.jsonl"], 2):
            (folder / other).write_text("{}")
    weight = draw.choice([1.0, 1.0, 1.0, 0.5, 1.5, 2.0])
    return {"path": str(path), "format": format, "weight": weight, "columns": columns}, total


def make_spec(folder: Path, draw: random.Random) -> tuple[Any, int | None]:
    source, rows = make_source(folder, draw)
    stages = draw.choice([("sft",), ("sft", "reward"), ("sft", "reward", "ppo"), ("dpo",)])
    limits = {"max_prompt_tokens": draw.choice([20, 40, 400]), "max_answer_tokens": draw.choice([2, 20, 400])}
    others = [{"demo": 60}] if draw.random() < 0.7 else []
    lost = draw.choice([1.0, 1.0, 1.0, 1.0, 0.1])
    spec = spec_of(source, *others, stages=stages, held_out=draw.choice([0, 0.3]), max_dropped=lost, **limits)
    if spec.stages.reward is not None and not others and draw.random() < 0.5:
        spec = spec.with_stages(reward={"loss": "last", "margins": True})
    return spec, rows


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    made = []
    for template in TEMPLATES:
        made.append(tiny.tokenizer())
        made[-1].chat_template = template
    return made


def test_every_row_is_used_or_counted_as_predicted(
    tokenizers: list[Any], tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = refused = 0
    for number in range(FILES):
        draw, folder = random.Random(number), tmp_path / "case"
        spec, rows = make_spec(folder / "data", draw)
        tokenizer = draw.choice(tokenizers)
        monkeypatch.setattr(survey, "tokenizer_of", lambda spec, folder, tokenizer=tokenizer: tokenizer)
        survey.sampled.cache_clear()
        predicted = survey.read_all(spec)
        errors = set()
        for stage in spec.trained:
            files = StageDir(folder / stage)
            try:
                prepare(spec, stage, tokenizer, files.data, world)
            except HpcRlhfError as error:
                errors.add(error.message if error.exit_code == 2 else f"to be tried again: {error}")
                continue
            counts = stage_counts(files)
            assert rows is None or counts[0].read == rows, f"case {number}: {counts[0].summary()}"
            if not predicted.problems:
                assert [one.to_dict() for one in counts] == predicted.data[f"stages.{stage}"], f"case {number}"
        assert not any("tried again" in error for error in errors), f"case {number}: {errors}"
        assert bool(errors) == bool(predicted.problems), f"case {number}: {errors} {predicted.problems}"
        fine, refused = fine + (not errors), refused + bool(errors)
        shutil.rmtree(folder)
    assert min(fine, refused) > FILES / 8, f"{fine} files were read and {refused} refused"


def test_check_refuses_broken_data_without_a_traceback(tmp_path: Path) -> None:
    for number in range(THROUGH_THE_CLI):
        folder = tmp_path / str(number)
        spec, _ = make_spec(folder / "data", random.Random(number))
        (folder / "job.yaml").write_text(dump_spec(spec))
        command = [sys.executable, "-m", "hpc_rlhf.cli", "check", "--data", str(folder / "job.yaml")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == (2 if survey.read_all(spec).problems else 0), done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
