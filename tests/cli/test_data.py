"""data: what it shows is what the stages then read."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.run.layout import StageDir
from hpc_rlhf.run.row_counts import stage_counts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.train import survey
from hpc_rlhf.train.data import texts, tokenized
from hpc_rlhf.train.data.token_files import SPLITS
from hpc_rlhf.train.runtime.alone import Alone
from hpc_rlhf.train.stages.learner import PAIRS, RESPONSES
from tests.train.data.test_row_counts import BROKEN, pair

pytestmark = pytest.mark.slow
JOB = """\
name: data
run_dir: run
data: {sources: [{path: pairs.jsonl, format: hh}], held_out: 0.2, max_prompt_tokens: 40, max_answer_tokens: 30}
models: {actor: {from_scratch: {model_type: llama, vocab_size: 300}}}
stages:
  pretrain:
    sources: [{path: a.jsonl, format: text}, {path: b.jsonl, format: text}]
    sequence_length: 16
    held_out: 0.2
    deduplicate: true
    max_line_documents: 5
    filters: {min_characters: 10}
  sft: {}
  reward: {}
  ppo: {ptx: {path: b.jsonl, format: text}}
  dpo: {}
  kto: {}
"""


def start(folder: Path, *args: str, stdout: int = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "data", "job.yaml", *args]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **env}
    return subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE
    )


def hpc_rlhf(folder: Path, *args: str) -> tuple[int, str, str]:
    """The exit code, and what it printed on stdout and stderr."""
    out, err = (process := start(folder, *args)).communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = {
        "a": [*(f"{n} ravens sat on {n + 1} white stones.\nTo the menu" for n in range(40)), "Too few."],
        "b": [f"{n} ravens sat on {n + 1} white stones.\nTo the menu" for n in range(30, 60)],
    }
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    rows = [*(pair(n) for n in range(120)), *BROKEN]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.yaml").write_text(JOB)
    return folder


@pytest.fixture(scope="module")
def shown(folder: Path) -> dict[str, Any]:
    code, out, err = hpc_rlhf(folder, "--json", "--rows", "2")
    assert code == 0, err
    facts: dict[str, Any] = json.loads(out)
    return facts


@pytest.fixture
def spec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    monkeypatch.chdir(folder)
    return load_spec(folder / "job.yaml")


def test_counts_are_those_of_the_stages(shown: dict[str, Any], spec: JobSpec, tmp_path: Path) -> None:
    world: Any = Alone()
    tokenizer = survey.tokenizer_of(spec, tmp_path / "tokenizer")
    stages = ("pretrain", "sft", "reward", "ppo", "ppo.ptx", "dpo", "kto")
    assert list(shown["data"]) == [f"stages.{name}" for name in stages]
    for stage in spec.shares:
        files, (source,) = StageDir(tmp_path / stage), shown["data"][f"stages.{stage}"]
        data = tokenized.prepare(spec, stage, tokenizer, files.data, world)
        assert stage_counts(files)[0].to_dict().items() <= source.items()
        assert [source["splits"][split]["rows"] for split in SPLITS] == [len(data.train), len(data.held_out)]
        columns = {"sft": RESPONSES, "kto": RESPONSES, "ppo": ("prompt_ids",)}.get(stage, PAIRS)
        assert source["splits"]["train"]["tokens"] == tokenized.token_lengths(data.train, *columns).sum()
        sequences = columns.count("prompt_ids") * (len(data.train) + len(data.held_out))
        assert sum(each["sequences"] for each in source["lengths"]) == sequences


def test_documents_are_those_of_pretraining(shown: dict[str, Any], spec: JobSpec, tmp_path: Path) -> None:
    world: Any = Alone()
    pretrain: Any = spec.stage("pretrain")
    tokenizer = survey.tokenizer_of(spec, tmp_path / "tokenizer")
    streams = texts.prepare(pretrain, spec.seed, tokenizer, tmp_path / "data", world)
    for source, own in zip(shown["data"]["stages.pretrain"], streams, strict=True):
        assert [source["splits"][split]["tokens"] for split in SPLITS] == [len(stream) for stream in own]
    first, second = (source["outcomes"] for source in shown["data"]["stages.pretrain"])
    assert first["too few characters"]["rows"] == 1
    assert second["repeated text"]["rows"] == 10
    assert second["trained"]["rows"] + second["held out"]["rows"] == second["without lines"]["rows"] == 20
    assert [source["lines"] for source in shown["data"]["stages.pretrain"]] == [40, 20]


def test_rows_are_shown_as_the_model_sees_them(shown: dict[str, Any]) -> None:
    def parts(stage: str, sequence: int = 0) -> list[tuple[str, bool]]:
        (source, *_) = shown["data"][f"stages.{stage}"]
        assert len(source["shown"]) == 2
        return [(part["text"], part["learned"]) for part in source["shown"][0]["sequences"][sequence]["parts"]]

    assert [learned for _, learned in parts("sft")] == [False, True]
    assert parts("sft")[0][0].endswith("Assistant:")
    assert parts("sft")[1][0].endswith("</s>")
    assert [learned for _, learned in parts("ppo")] == [False]
    chosen, rejected = parts("dpo"), parts("dpo", 1)
    assert chosen[0] == rejected[0]
    assert chosen[1] != rejected[1]
    assert [learned for _, learned in parts("kto")] == [False, True]
    assert [row["sequences"][0]["name"] for row in shown["data"]["stages.kto"][0]["shown"]] == ["good", "bad"]
    assert parts("pretrain")[0] == ("<s>", False)
    assert sum(len(text) for text, learned in parts("pretrain") if learned) > 20
    scored, other = parts("reward"), parts("reward", 1)
    assert scored[-1][1]
    assert scored[0][0] == other[0][0], "what both have in common is not compared"


def test_a_mask_is_in_brackets_or_in_colour(folder: Path) -> None:
    code, out, err = hpc_rlhf(folder, "--stage", "sft")
    assert code == 0, err
    assert "Assistant:[ " in out
    assert "</s>]" in out
    ours, theirs = pty.openpty()
    terminal = {"COLUMNS": "40", "TERM": "xterm", "NO_COLOR": "", "LANG": "C.UTF-8"}
    process = start(folder, "--stage", "sft", stdout=theirs, **terminal)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # the end
        os.close(ours)
    assert process.wait() == 0
    assert b"Assistant:\x1b[32m " in seen
    bars = [line.decode() for line in seen.splitlines() if b" tokens  " in line]
    assert max(map(len, bars)) == 40, "the terminal's width"


def test_what_cannot_be_shown_is_one_error(folder: Path) -> None:
    code, out, err = hpc_rlhf(folder, "--stage", "grpo")
    assert (code, out) == (2, "")
    assert err.startswith("error: --stage: the spec has no stage grpo\n  hint: choose one of pretrain, sft,")
    (folder / "broken.jsonl").write_text('{"text": "good"}\n{"text": "half\n')
    sets = ("--set", "stages.pretrain.sources=[{path: broken.jsonl, format: text}]", "--stage", "pretrain")
    code, _, err = hpc_rlhf(folder, *sets)
    assert code == 2
    assert f"error: {folder}/broken.jsonl:2:" in err
    assert "Traceback" not in err
