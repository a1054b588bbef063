"""KTO on real ranks: it starts at its reference, learns labels and pairs alike, and resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.train.data.sources import read
from tests.train.stages import log_tail, make_run, metrics, run_stage, tiny_spec, weights_digest

pytestmark = pytest.mark.train


def kto(path: Path, source: dict[str, Any], stop_after: int | None = None, **fields: Any) -> RunDir:
    """KTO without fine-tuning before it, on two ranks."""
    spec = tiny_spec(path, kto=fields)
    data = spec.data.model_copy(update={"sources": (SourceSpec.model_validate(source),)})
    run = make_run(spec.model_copy(update={"data": data}))
    if stop_after is not None:
        assert run_stage(run, "kto", 2, stop_after) == [75, 75], log_tail(run, "kto")
    assert run_stage(run, "kto", 2) == [0, 0], log_tail(run, "kto")
    return run


def train_lines(run: RunDir) -> list[dict[str, Any]]:
    return [line for line in metrics(run, "kto") if line["kind"] == "train"]


def labeled(path: Path) -> Path:
    """The demo's pairs as labeled responses, two bad ones for each good one."""
    with path.open("w") as file:
        for sample in read(SourceSpec(demo=400), 7):
            for response, label in ((sample.chosen, True), (sample.rejected, False), (sample.rejected + "!", False)):
                file.write(json.dumps({"prompt": sample.prompt, "completion": response, "label": label}) + "\n")
    return path


def test_it_starts_at_its_reference_and_learns(tmp_path: Path) -> None:
    source = {"path": str(labeled(tmp_path / "thumbs.jsonl")), "format": "prompt-chosen-rejected"}
    run = kto(tmp_path / "run", source, max_steps=8, lr=5e-3, desirable_weight=2.0)
    first, *_, last = train_lines(run)
    assert first["margin"] == first["kl"] == 0
    assert first["accuracy"] == 0.5
    assert 0.5 < first["loss"] < 1, "half of a weight of 1 or 2"
    assert last["margin"] > 0.01
    assert last["accuracy"] > 0.6
    assert "set desirable_weight" not in log_tail(run, "kto"), "one good response of weight 2 for two bad ones"
    samples = [json.loads(line) for line in run.stage("kto").samples.read_text().splitlines()]
    assert any(row["answer"] != row["sft_answer"] for row in samples)


def test_a_stopped_run_with_adapters_ends_in_the_same_weights(tmp_path: Path) -> None:
    """On pairs, with the adapters switched off as the reference."""
    fields = {"zero": 3, "precision": "bf16", "lora": {"rank": 4}, "dropout": 0.1}
    whole = kto(tmp_path / "whole", {"demo": 400}, **fields)
    stopped = kto(tmp_path / "stopped", {"demo": 400}, stop_after=1, **fields)
    assert train_lines(whole)[0]["kl"] == 0
    assert train_lines(whole)[-1]["kl"] != 0
    assert weights_digest(whole, "kto") == weights_digest(stopped, "kto")
