"""DPO on real ranks: it starts at its reference, learns, agrees with the unsharded run, resumes exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from tests.train.stages import log_tail, make_run, metrics, run_stage, tiny_spec, weights_digest

pytestmark = pytest.mark.train


def dpo(path: Path, stop_after: int | None = None, **fields: Any) -> RunDir:
    """DPO without fine-tuning before it, on two ranks."""
    run = make_run(tiny_spec(path, dpo=fields))
    if stop_after is not None:
        assert run_stage(run, "dpo", 2, stop_after) == [75, 75], log_tail(run, "dpo")
    assert run_stage(run, "dpo", 2) == [0, 0], log_tail(run, "dpo")
    return run


def train_lines(run: RunDir) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "time"}
        for line in metrics(run, "dpo")
        if line["kind"] == "train"
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return dpo(tmp_path_factory.mktemp("plain") / "run")


def test_it_starts_at_its_reference_and_learns_the_pairs(plain: RunDir) -> None:
    first, *_, last = train_lines(plain)
    assert first["loss"] == pytest.approx(math.log(2))
    assert (first["margin"], first["chosen_reward"], first["rejected_reward"]) == (0, 0, 0)
    assert first["accuracy"] == 0.5, "every pair is a tie"
    assert last["loss"] < 0.68
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])
    assert last["margin"] > 0.02
    assert last["accuracy"] > 0.5
    (held_out,) = [line for line in metrics(plain, "dpo") if line["kind"] == "eval"]
    assert 0.4 < held_out["accuracy"] <= 1
    facts = manifest.require(plain.stage("dpo").model, "the model")
    assert facts["metrics"]["accuracy"] == pytest.approx(held_out["accuracy"])


def test_its_model_loads_and_its_samples_compare_before_and_after(plain: RunDir) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = plain.stage("dpo").model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [json.loads(line) for line in plain.stage("dpo").samples.read_text().splitlines()]
    assert len(rows) == 16
    assert any(row["answer"] != row["sft_answer"] for row in rows)
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"]
    answer = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == rows[0]["answer"]


def test_zero_3_follows_the_unsharded_run(plain: RunDir, tmp_path: Path) -> None:
    ours, theirs = train_lines(dpo(tmp_path / "run", zero=3, micro_batch=2)), train_lines(plain)
    for name in ("loss", "margin", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3, abs=1e-4)


def test_adapters_switched_off_are_the_reference_and_a_stopped_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    fields = {"zero": 3, "precision": "bf16", "lora": {"rank": 4}, "dropout": 0.1, "label_smoothing": 0.1}
    whole = dpo(tmp_path / "whole", **fields)
    stopped = dpo(tmp_path / "stopped", stop_after=1, **fields)
    first, *_, last = train_lines(whole)
    assert first["margin"] == pytest.approx(0, abs=0.1), "but for dropout the reference exactly"
    assert last["loss"] < first["loss"]
    assert train_lines(stopped) == train_lines(whole)
    assert weights_digest(stopped, "dpo") == weights_digest(whole, "dpo")
    assert stopped.stage("dpo").samples.read_text() == whole.stage("dpo").samples.read_text()
