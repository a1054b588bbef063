"""Pretraining on real ranks: it learns, resumes exactly on any number of them, and SFT starts from its model."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from tests.train.stages import log_tail, make_run, metrics, run_stage, tiny_spec, weights_digest

pytestmark = pytest.mark.train
ROOT = Path(__file__).parents[2]
TIMES = {"time", "tokens_per_second"}


def write_texts(folder: Path) -> list[dict[str, Any]]:
    """Two sources: sentences of a grammar in two shards, and numbers that count up."""
    draw, subjects, verbs = random.Random(0), ["the cat", "a dog", "my raven"], ["sees", "likes", "finds"]
    (folder / "words").mkdir(parents=True)
    for shard in ("a", "b"):
        rows = [f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(subjects)}. " * 3 for _ in range(300)]
        (folder / f"words/{shard}.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    counts = [" ".join(map(str, range(n, n + 8))) for n in draw.choices(range(80), k=150)]
    (folder / "numbers.csv").write_text("text\n" + "".join(f"{row}\n" for row in counts))
    words = {"path": str(folder / "words"), "format": "text", "columns": {"text": "body"}}
    return [words, {"path": str(folder / "numbers.csv"), "format": "text", "weight": 2.0}]


def pretraining(run_dir: Path, sources: list[dict[str, Any]], ranks: int = 2, **fields: Any) -> RunDir:
    own = {"sources": sources, "sequence_length": 64, "held_out": 0.1, "lr": 3e-3, **fields}
    spec = tiny_spec(run_dir, ranks, sft={"max_steps": 2}).model_dump(mode="json")
    slurm = spec["stages"]["sft"]["slurm"]
    spec["stages"]["pretrain"] = {"micro_batch": 4, "global_batch": 16, "precision": "fp32", "slurm": slurm, **own}
    return make_run(type(tiny_spec(run_dir)).model_validate(spec))


def lines(run: RunDir, kind: str) -> list[dict[str, Any]]:
    rows = [line for line in metrics(run, "pretrain") if line["kind"] == kind]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sources: list[dict[str, Any]]) -> RunDir:
    run = pretraining(tmp_path_factory.mktemp("whole") / "run", sources, epochs=4)
    assert run_stage(run, "pretrain", 2) == [0, 0], log_tail(run, "pretrain")
    return run


def test_a_new_model_learns_every_source(whole: RunDir) -> None:
    first, last = lines(whole, "eval")[0], lines(whole, "eval")[-1]
    for name in ("perplexity", "perplexity/words", "perplexity/numbers"):
        assert first[name] > 200
        assert last[name] < 15, name
    assert min(last["perplexity/words"], last["perplexity/numbers"]) < last["perplexity"]
    assert last["loss"] == pytest.approx(math.log(last["perplexity"]))
    facts = manifest.require(whole.stage("pretrain").model, "pretrain")["metrics"]
    assert facts["perplexity_after"] == pytest.approx(last["perplexity"])
    assert all(line["tokens_per_second"] > 0 for line in metrics(whole, "pretrain") if line["kind"] == "train")


def test_a_stopped_run_ends_in_the_same_weights(whole: RunDir, tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    run = pretraining(tmp_path / "run", sources, epochs=4)
    for stop in (3, 6):
        assert run_stage(run, "pretrain", 2, stop_after=stop) == [75, 75], log_tail(run, "pretrain")
    assert run_stage(run, "pretrain", 2) == [0, 0], log_tail(run, "pretrain")
    assert weights_digest(run, "pretrain") == weights_digest(whole, "pretrain")
    assert lines(run, "train") == lines(whole, "train")
    assert lines(run, "eval") == lines(whole, "eval")


def test_one_rank_learns_the_same_as_two(whole: RunDir, tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    run = pretraining(tmp_path / "run", sources, 1, epochs=4)
    assert run_stage(run, "pretrain", 1) == [0], log_tail(run, "pretrain")
    for one, two in zip(lines(run, "train"), lines(whole, "train"), strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory: pytest.TempPathFactory, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    run = pretraining(tmp_path_factory.mktemp("few") / "run", sources, max_steps=3)
    assert run_stage(run, "pretrain", 2) == [0, 0], log_tail(run, "pretrain")
    return lines(run, "train")


@pytest.mark.parametrize("strategy", [{"zero": 3}, {"tensor_parallel": 2}, {"lora": {"rank": 4}}], ids=str)
def test_every_strategy_learns_the_same_text(
    strategy: dict[str, Any], few_steps: list[dict[str, Any]], tmp_path: Path, sources: list[dict[str, Any]]
) -> None:
    run = pretraining(tmp_path / "run", sources, max_steps=3, **strategy)
    assert run_stage(run, "pretrain", 2) == [0, 0], log_tail(run, "pretrain")
    alike = few_steps[:1] if "lora" in strategy else few_steps  # adapters begin as the model and learn less
    for one, other in zip(lines(run, "train"), alike, strict="lora" not in strategy):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_attention_stays_within_documents_unless_it_may_cross(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    """A step from the same weights: within documents, its loss is the mean over documents on their own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = pretraining(tmp_path / "within", sources[1:], 1, max_steps=1, global_batch=4)
    assert run_stage(run, "pretrain", 1) == [0], log_tail(run, "pretrain")
    across = pretraining(tmp_path / "across", sources[1:], 1, max_steps=1, global_batch=4, cross_documents=True)
    assert run_stage(across, "pretrain", 1) == [0], log_tail(across, "pretrain")
    initial = run.stage("pretrain").path / "initial"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(initial),
        AutoTokenizer.from_pretrained(run.stage("pretrain").model),
    )
    from hpc_rlhf.train.data.sampler import blended, shuffled
    from hpc_rlhf.train.data.sequences import Sequences
    from hpc_rlhf.train.data.token_files import TokenStream

    (folder,) = (path.parent for path in run.stage("pretrain").data.glob("*/manifest.json"))
    facts = manifest.require(folder, "tokens")
    rows = Sequences([TokenStream(folder, facts["segments"], "train", facts["dtype"])], 64, cross=False)
    assert tokenizer.decode(rows[0]["ids"][: rows[0]["documents"][0]]).startswith(tokenizer.bos_token)
    losses, counts = [0.0, 0.0], [0, 0]
    for position in range(4):
        source, number = blended(position, [2 * len(rows)])
        row = rows[shuffled(number, len(rows), 7, "text", source, 0)]
        pieces = torch.from_numpy(row["ids"]).split(row["documents"])
        for place, parts in enumerate((pieces, [torch.from_numpy(row["ids"])])):
            for ids in parts:
                if len(ids) > 1:
                    logits = model(ids[None, :-1]).logits[0]
                    losses[place] += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
                    counts[place] += len(ids) - 1
    for place, each in enumerate((run, across)):
        (line,) = lines(each, "train")
        assert (line["tokens"], line["loss"]) == (counts[place], pytest.approx(losses[place] / counts[place], rel=1e-5))
    assert counts[0] < counts[1]


def test_fine_tuning_starts_from_the_pretrained_model(whole: RunDir) -> None:
    assert run_stage(whole, "sft", 2) == [0, 0], log_tail(whole, "sft")
    first = next(line for line in metrics(whole, "sft") if line["kind"] == "eval")
    assert first["perplexity"] != pytest.approx(300, rel=0.2)
    pretrained, tuned = (load_file(whole.stage(name).model / "model.safetensors") for name in ("pretrain", "sft"))
    for name, weight in tuned.items():
        assert (weight - pretrained[name]).abs().max() < 0.01, "two steps change little"


def test_the_example_runs_from_text_to_chat(tmp_path: Path) -> None:
    def hpc_rlhf(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "hpc_rlhf.cli", *args], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    sets = [f"run_dir={tmp_path / 'run'}", "stages.pretrain.epochs=1", "stages.sft.max_steps=20"]
    job = ["jobs/tiny-pretrain.yaml", *(word for text in sets for word in ("--set", text))]
    hpc_rlhf("check", *job)
    planned = json.loads(hpc_rlhf("plan", *job, "--json"))["jobs"]
    assert [(each["stage"], each["needs"]) for each in planned] == [("pretrain", []), ("sft", ["pretrain"])]
    assert "held-out perplexity" in hpc_rlhf("run", *job)
    states = json.loads(hpc_rlhf("status", str(tmp_path / "run"), "--json"))["stages"]
    assert [stage["state"] for stage in states] == ["done", "done"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(text in report for text in ("tokens per second", "held out, demo", "held out, arithmetic"))
