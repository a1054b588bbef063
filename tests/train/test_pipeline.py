"""Pipelines on real ranks train like one rank, resume exactly, and export a model that the next stage takes.

Float32 on one thread: the sums differ in their order only, and curves agree to 1e-5. bfloat16 rounds weights to three
digits.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from hpc_rlhf.run.events import Resumed
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.job import FromScratch, JobSpec
from hpc_rlhf.spec.load import read_spec
from tests.train.grid import run_chains
from tests.train.stages import log_tail, make_run, metrics, run_stage, tiny_spec, weights_digest
from tests.train.test_pretrain import write_texts

pytestmark = pytest.mark.train

STEPS = 4
CURVES = ("loss", "grad_norm", "tokens")
LIKE_LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
# Tied embeddings and others, positions that are added and rotary ones, layers with and without windows, and
# embeddings that are projected.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LIKE_LLAMA},
    "qwen2": {
        "model_type": "qwen2", **LIKE_LLAMA, "tie_word_embeddings": True,
        "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3,
    },
    "qwen3": {"model_type": "qwen3", **LIKE_LLAMA, "tie_word_embeddings": False, "head_dim": 16},
    "qwen3 of two heads": {"model_type": "qwen3", **LIKE_LLAMA, "num_key_value_heads": 2, "head_dim": 16},
    "opt": {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 5, "num_attention_heads": 2,
        "word_embed_proj_dim": 24, "max_position_embeddings": 64,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 5, "n_head": 2, "n_positions": 64},
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """A way to run pretraining or SFT."""

    model: str
    ranks: int = 1
    fields: dict[str, Any] = field(default_factory=dict)
    stage: str = "sft"

    @property
    def tolerance(self) -> float:
        return 5e-3 if "precision" in self.fields else 1e-5

    @property
    def alone(self) -> Setup:
        """One rank, in float32."""
        return Setup(self.model, stage=self.stage)

    def make(self, folder: Path, sources: list[dict[str, Any]]) -> RunDir:
        fields = {"max_steps": STEPS, "lr": 1e-3, "global_batch": 16, "micro_batch": 2, **self.fields}
        if self.stage == "sft":
            spec = tiny_spec(folder, self.ranks, sft=fields)
        else:
            base = tiny_spec(folder, self.ranks, sft={}).model_dump(mode="json")
            text = {"sources": sources, "sequence_length": 64, "held_out": 0.1, "precision": "fp32"}
            base["stages"] = {"pretrain": {**text, **fields, "slurm": base["stages"]["sft"]["slurm"]}}
            spec = JobSpec.model_validate(base)
        cast(FromScratch, spec.models.actor).from_scratch.clear()
        cast(FromScratch, spec.models.actor).from_scratch.update({"vocab_size": 300, **MODELS[self.model]})
        return make_run(spec)


TWO: dict[str, Any] = {"pipeline_parallel": 2}
FOUR: dict[str, Any] = {"pipeline_parallel": 4}
RECOMPUTED = {"activation_checkpointing": True}
SETUPS = {
    "llama, ZeRO-1": Setup("llama", 2, {**TWO, **RECOMPUTED, "zero": 1}),
    "qwen2": Setup("qwen2", 2, TWO),
    "qwen2, ZeRO-1, bf16": Setup("qwen2", 2, {**TWO, "zero": 1, "precision": "bf16"}),
    "qwen3": Setup("qwen3", 2, TWO),
    "opt": Setup("opt", 2, TWO),
    "gpt2, pretraining": Setup("gpt2", 2, TWO, "pretrain"),
    "two pipelines of gpt2": Setup("gpt2", 4, TWO),
    "two pipelines of opt, ZeRO-1": Setup("opt", 4, {**TWO, **RECOMPUTED, "zero": 1}),
    "four stages of gpt2, ZeRO-1": Setup("gpt2", 4, {**FOUR, "zero": 1}),
    "qwen3, cut layers": Setup("qwen3 of two heads", 4, {**TWO, **RECOMPUTED, "tensor_parallel": 2}),
    "opt, cut layers, ZeRO-1": Setup("opt", 4, {**TWO, "tensor_parallel": 2, "zero": 1}),
    "four stages of qwen3, pretraining": Setup("qwen3", 4, FOUR, "pretrain"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunDir, RunDir]]:
    """Each setup's run, and that of one rank."""
    folder = tmp_path_factory.mktemp("pipelines")
    sources = write_texts(folder / "texts")
    made: dict[str, RunDir] = {}
    for setup in SETUPS.values():
        for each in (setup, setup.alone):
            if str(each) not in made:
                made[str(each)] = each.make(folder / f"{len(made)}", sources)
    for ranks in (1, 2, 4):
        keys = [str(each) for setup in SETUPS.values() for each in (setup, setup.alone) if each.ranks == ranks]
        run_chains([made[key] for key in dict.fromkeys(keys)], ranks)
    return {name: (made[str(setup)], made[str(setup.alone)]) for name, setup in SETUPS.items()}


def curve(run: RunDir, stage: str, name: str, kind: str = "train") -> list[float]:
    return [line[name] for line in metrics(run, stage) if line["kind"] == kind]


@pytest.mark.parametrize("name", SETUPS)
def test_a_pipeline_learns_like_one_rank(runs: dict[str, tuple[RunDir, RunDir]], name: str) -> None:
    ours, theirs = runs[name]
    stage, tolerance = SETUPS[name].stage, SETUPS[name].tolerance
    for number in CURVES:
        values = curve(ours, stage, number)
        assert len(values) == STEPS
        assert values == pytest.approx(curve(theirs, stage, number), rel=tolerance), number
    evaluated = curve(ours, stage, "perplexity", "eval")
    assert evaluated == pytest.approx(curve(theirs, stage, "perplexity", "eval"), rel=tolerance)
    assert evaluated[-1] < evaluated[0]


@pytest.mark.parametrize("name", [name for name in SETUPS if "bf16" not in name])
def test_the_whole_model_is_exported(runs: dict[str, tuple[RunDir, RunDir]], name: str) -> None:
    ours, theirs = (load_file(run.stage(SETUPS[name].stage).model / "model.safetensors") for run in runs[name])
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, atol=1e-5, rtol=1e-4)


def without_time(run: RunDir) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in metrics(run, "sft")]


@pytest.mark.parametrize(
    ("name", "layout", "ranks"),
    [
        ("llama, ZeRO-1", {"pipeline_parallel": 1}, 1),
        ("qwen3, cut layers", {"pipeline_parallel": 1}, 2),
        ("opt, cut layers, ZeRO-1", {"pipeline_parallel": 2, "tensor_parallel": 1}, 2),
    ],
)
def test_a_stopped_pipeline_resumes_exactly_or_in_another_layout(
    runs: dict[str, tuple[RunDir, RunDir]], tmp_path: Path, name: str, layout: dict[str, int], ranks: int
) -> None:
    """The next stage starts from its model."""
    (whole, alone), setup = runs[name], SETUPS[name]
    stopped = setup.make(tmp_path / "stopped", [])
    assert run_stage(stopped, "sft", setup.ranks, stop_after=2) == [75] * setup.ranks, log_tail(stopped, "sft")
    spec = read_spec(stopped.job_yaml).model_dump(mode="json")
    spec["run_dir"] = str(tmp_path / "apart")
    spec["stages"]["sft"] |= {**layout, "slurm": {"gpus_per_node": 0, "ranks_per_node": ranks}}
    apart = make_run(JobSpec.model_validate(spec))
    shutil.copytree(stopped.stage("sft").path, apart.stage("sft").path, dirs_exist_ok=True)

    assert run_stage(stopped, "sft", setup.ranks) == [0] * setup.ranks, log_tail(stopped, "sft")
    assert weights_digest(stopped, "sft") == weights_digest(whole, "sft")
    assert without_time(stopped) == without_time(whole)

    after = tiny_spec(tmp_path / "after", 1, dpo={"max_steps": 1, "lr": 1e-3}).model_dump(mode="json")
    after["models"]["actor"] = str(apart.stage("sft").model)
    dpo = make_run(JobSpec.model_validate(after))
    run_chains([apart], ranks)
    run_chains([dpo], 1)
    resumed = Ledger(apart.ledger).last(Resumed, "sft")
    assert resumed is not None
    assert resumed.step >= 2
    for number in CURVES:
        assert curve(apart, "sft", number) == pytest.approx(curve(alone, "sft", number), rel=1e-5)
    assert curve(dpo, "dpo", "loss") == pytest.approx([math.log(2)], rel=1e-3)
