"""Ranks that share the tokens of packed rows compute what one rank computes from all of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import FromScratch, JobSpec
from tests.train.grid import run_chains
from tests.train.ranks import reports
from tests.train.stages import log_tail, make_run, metrics, run_stage, tiny_spec, weights_digest

pytestmark = pytest.mark.train

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Setup:
    """A model, and how two ranks share its rows: with this many data-parallel groups."""

    kind: str
    data: int
    zero: int
    tensor: int = 1


SETUPS = (
    Setup("llama", 1, 0), Setup("qwen2", 1, 1), Setup("qwen3", 1, 2), Setup("opt", 1, 3),
    Setup("gpt2", 2, 0), Setup("opt", 2, 1), Setup("qwen2", 2, 2), Setup("llama", 2, 3),
    Setup("qwen3", 1, 1, tensor=2),
)  # fmt: skip


def chain(folder: Path, kind: str, ranks: int, **fields: Any) -> RunDir:
    """Pretraining, and SFT of its model, in a few steps. A row holds all samples of a rank."""
    data = ranks // (fields.get("tensor_parallel", 1) * fields.get("sequence_parallel", 1))
    raw = tiny_spec(folder, ranks, sft={"max_steps": 3}).model_dump(mode="json")
    slurm = raw["stages"]["sft"]["slurm"]
    text = {"sources": [{"demo": 200}], "sequence_length": 100, "precision": "fp32", "global_batch": 16, "slurm": slurm}
    for stage, own in {"pretrain": {**text, "max_steps": 3, "lr": 1e-3}, "sft": raw["stages"]["sft"]}.items():
        raw["stages"][stage] = {**own, "micro_batch": 16 // data, **fields}
    spec = JobSpec.model_validate(raw)
    cast(FromScratch, spec.models.actor).from_scratch.update(model_type=kind, **HEADS, **MODELS[kind])
    return make_run(spec)


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[Setup | str, RunDir]:
    """Each model's chain on one rank, and in every setup."""
    folder = tmp_path_factory.mktemp("chains")
    runs: dict[Setup | str, RunDir] = {kind: chain(folder / kind, kind, 1) for kind in MODELS}
    run_chains(list(runs.values()), 1)
    for ranks in (2, 4):
        own = [setup for setup in SETUPS if 2 * setup.data * setup.tensor == ranks]
        made = {
            setup: chain(
                folder / f"{ranks}-{number}", setup.kind, ranks,
                zero=setup.zero, tensor_parallel=setup.tensor, sequence_parallel=2,
            )
            for number, setup in enumerate(own)
        }  # fmt: skip
        run_chains(list(made.values()), ranks)
        runs |= made
    return runs


def curves(run: RunDir, stage: str) -> dict[str, list[float]]:
    lines = metrics(run, stage)
    train = {
        name: [each[name] for each in lines if each["kind"] == "train"] for name in ("loss", "grad_norm", "tokens")
    }
    return {**train, "held out": [each["perplexity"] for each in lines if each["kind"] == "eval"]}


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_curves_are_those_of_one_rank(chains: dict[Setup | str, RunDir], setup: Setup) -> None:
    for stage in ("pretrain", "sft"):
        ours, theirs = curves(chains[setup], stage), curves(chains[setup.kind], stage)
        assert len(ours["loss"]) == 3
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (stage, name)


def test_a_stopped_stage_resumes_exactly_and_with_other_groups(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_steps": 5, "micro_batch": 2, "zero": 2, "lora": {"rank": 4}, "dropout": 0.1}
    whole, stopped, other = (
        make_run(tiny_spec(tmp_path / name, sft={**fields, "sequence_parallel": 2}))
        for name in ("whole", "stopped", "other")
    )
    assert run_stage(whole, "sft", 2) == [0, 0], log_tail(whole, "sft")
    assert run_stage(stopped, "sft", 2, stop_after=2) == [75, 75], log_tail(stopped, "sft")
    shutil.copytree(stopped.stage("sft").checkpoints, other.stage("sft").checkpoints)
    assert run_stage(stopped, "sft", 2) == [0, 0], log_tail(stopped, "sft")
    assert weights_digest(stopped, "sft") == weights_digest(whole, "sft")
    other = make_run(tiny_spec(tmp_path / "other", sft=fields))
    assert run_stage(other, "sft", 2) == [0, 0], log_tail(other, "sft")
    ours, theirs = (
        [line["tokens"] for line in metrics(run, "sft") if line["kind"] == "train"] for run in (other, whole)
    )
    assert 0 < len(ours) < 5
    assert ours == theirs[-len(ours) :]


RANK = """
import json, sys, torch
import torch.distributed as dist
from hpc_rlhf.train.runtime.world import join
world = join(2).laid_out(sequence=2)
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.models import agreement, packed_attention, rotary
from hpc_rlhf.train.models.language_model import LanguageModel, RewardModel
from tests.train import tiny

torch.set_num_threads(1)
lengths = (60, 4, 64, 30, 61, 33)
ids = torch.randint(3, tiny.VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(1))

def far(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()

def compare(make, run, kind, **fields):
    whole, shared = make(kind, **fields), make(kind, **fields)
    for model in (whole, shared):
        packed_attention.enable(model)
    wrap = RewardModel if make is tiny.classifier else LanguageModel
    expected, model = wrap(whole), wrap(shared)
    agreement.verify(model, world, "x")
    theirs, ours = run(expected), run(model)
    theirs.sum().backward()
    ours.sum().backward()
    outputs, gradients = far(ours, theirs), [far(ours, theirs)]
    for one, other in zip(whole.parameters(), shared.parameters()):
        mean = torch.zeros_like(one) if other.grad is None else other.grad / 2
        dist.all_reduce(mean)
        if one.grad is not None:
            gradients.append(far(mean, one.grad))
    return max(outputs, *gradients)

def log_probs(predicted):
    return lambda model: sum(model(ids, lengths, predicted, 0.7, True))

last = torch.arange(225, 252)  # all of them on the second rank
some = torch.tensor([place for place in range(252) if place not in (0, 60, 64, 128, 158, 219)])
seen = {
    "windows": compare(tiny.causal, log_probs(some), "mistral", sliding_window=5),
    "one key head": compare(tiny.causal, log_probs(some), "llama", num_key_value_heads=1),
    "three key heads": compare(
        tiny.causal, log_probs(some), "qwen2", hidden_size=48, num_attention_heads=6, num_key_value_heads=3
    ),
    "tokens of one rank": compare(tiny.causal, log_probs(last), "llama"),
    "their sum": compare(tiny.causal, lambda model: model(ids, lengths, last, summed=True)[0], "llama"),
    "values": compare(tiny.classifier, lambda model: model(ids, lengths).square(), "qwen3"),
}
refused = {}
for name, kind, fields in (
    ("heads", "llama", {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 40}),
    ("own logits", "cohere", {}),
    ("rotary", "llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("recurrent", "mamba", {"hidden_size": 32, "num_hidden_layers": 1}),
):
    model = tiny.causal(kind, **fields)
    packed_attention.enable(model)
    rotary.separate(model)
    try:
        agreement.verify(LanguageModel(model), world, "x")
    except HpcRlhfError as error:
        refused[name] = str(error)
print(json.dumps({"far": seen, "refused": refused}))
"""


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    """The reports of two ranks that share rows."""
    return reports(RANK, [], 2)


def test_outputs_and_gradients_are_those_of_whole_rows(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert len(rank["far"]) == 6
        for name, far in rank["far"].items():
            assert far < 1e-5, name


def test_models_of_which_no_part_of_a_sequence_can_run_are_refused(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        refused = rank["refused"]
        assert "its 5 attention heads cannot be divided by sequence_parallel: 2" in refused["heads"]
        assert "logit_scale" in refused["own logits"]
        assert "depends on the length of the whole sequence" in refused["rotary"]
        assert "cannot share the sequences of mamba models" in refused["recurrent"]
