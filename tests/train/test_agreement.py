"""The same seed gives the same curves, whatever the number of ranks, accumulation, sharding and offload.

Float32 on one thread: the sums differ in their order only, and curves agree to 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import FromScratch, JobSpec
from tests.train import tiny
from tests.train.grid import run_chains
from tests.train.stages import make_run, metrics, tiny_spec

pytestmark = pytest.mark.train

GLOBAL_BATCH = 16
STEPS = {"sft": 4, "reward": 3, "ppo": 3, "grpo": 3, "dpo": 3, "kto": 3}
CURVES = {
    "sft": ("loss", "grad_norm", "tokens"),
    "reward": ("loss", "grad_norm", "margin"),
    "ppo": ("kl", "reward", "critic_loss", "entropy"),
}


@dataclass(frozen=True)
class Setup:
    """A setup in which the chain is run.

    Attributes:
        like: the setup whose curves it should have.
        fields, ppo: of all stages, and of PPO alone.
        curves: for each stage that is run, the metrics that are compared.
        model: fields of the model's configuration that differ from the tiny Llama's.
        rows: of the data.
    """

    ranks: int
    accumulation: int
    fields: dict[str, Any] = field(default_factory=dict)
    ppo: dict[str, Any] = field(default_factory=dict)
    like: str = "plain"
    tolerance: float = 1e-5
    curves: dict[str, tuple[str, ...]] = field(default_factory=lambda: CURVES)
    model: dict[str, Any] = field(default_factory=dict)
    rows: int = 400

    @property
    def layer_group(self) -> int:
        """Ranks that share the layers."""
        return int(self.fields.get("tensor_parallel", 1))

    @property
    def group(self) -> int:
        """Ranks that share samples."""
        return self.layer_group * int(self.fields.get("sequence_parallel", 1))

    def make(self, folder: Path) -> RunDir:
        fields = {
            "global_batch": GLOBAL_BATCH,
            "micro_batch": GLOBAL_BATCH // (self.ranks // self.group) // self.accumulation,
            **self.fields,
        }
        stages: dict[str, dict[str, Any]] = {
            stage: {**fields, "max_steps": STEPS[stage], **(self.ppo if stage == "ppo" else {})}
            for stage in self.curves
        }
        spec = tiny_spec(folder, self.ranks, **stages)
        cast(FromScratch, spec.models.actor).from_scratch.update(self.model)
        fields = spec.model_dump(mode="json")
        fields["data"]["sources"] = [{"demo": self.rows}]
        return make_run(JobSpec.model_validate(fields))


BOTH = {"zero": 3, "offload_optimizer": True, "offload_params": True}
LORA = {"lora": {"rank": 4, "alpha": 8}}
LORA_AND_ALL = {"lora": {"rank": 4, "only": False}}
EXPERTS: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
DPO = {"dpo": ("loss", "grad_norm", "margin")}
KTO = {"kto": ("loss", "grad_norm", "margin", "kl")}
GRPO = {"grpo": ("loss", "grad_norm", "kl", "reward", "entropy")}
TENSOR = {"tensor_parallel": 2}
SEQUENCE = {"sequence_parallel": 2}
HALF: dict[str, Any] = {"like": "SFT alone", "tolerance": 1e-3, "curves": {"sft": ("loss",)}}
HALF_NORMS: dict[str, Any] = {"like": "SFT alone", "tolerance": 5e-3, "curves": {"sft": ("grad_norm",)}}
# Passes of more tokens than an MLP takes at a time, on two ranks too.
LONG: dict[str, Any] = {"global_batch": 154, "micro_batch": 154}
CHUNKED: dict[str, Any] = {**LONG, "chunked_mlp": True}
CHUNKED_HALVES: dict[str, Any] = {**CHUNKED, "micro_batch": 77}
WIDE = {"intermediate_size": 512}  # ZeRO-3 keeps narrower matrices gathered
LONG_SFT: dict[str, Any] = {"rows": 700, "curves": {"sft": CURVES["sft"]}, "model": WIDE}
LIKE_LONG: dict[str, Any] = {**LONG_SFT, "like": "long passes"}
SETUPS = {
    "plain": Setup(1, 1),
    "plain, accumulated": Setup(1, 4),
    "four ranks": Setup(4, 1),
    "ZeRO-1": Setup(2, 4, {"zero": 1}),
    "ZeRO-2": Setup(4, 1, {"zero": 2}),
    "ZeRO-2, accumulated": Setup(2, 4, {"zero": 2}),
    "ZeRO-3": Setup(2, 1, {"zero": 3}),
    "ZeRO-3, accumulated": Setup(4, 4, {"zero": 3}),
    "ZeRO-1, optimizer offloaded": Setup(2, 4, {"zero": 1, "offload_optimizer": True}),
    "ZeRO-2, optimizer offloaded": Setup(2, 1, {"zero": 2, "offload_optimizer": True}, {"offload_frozen": True}),
    "ZeRO-3, weights offloaded": Setup(2, 1, {"zero": 3, "offload_params": True}),
    "all offloaded": Setup(2, 4, BOTH, {"offload_frozen": True}),
    "all offloaded on one rank": Setup(1, 1, BOTH),
    "actor and critic apart": Setup(2, 1, BOTH, {"critic": {"zero": 0}}),
    "LoRA": Setup(1, 1, LORA),
    "LoRA, ZeRO-1": Setup(2, 1, {**LORA, "zero": 1}, like="LoRA"),
    "LoRA, ZeRO-2, offloaded": Setup(2, 4, {**LORA, "zero": 2, "offload_optimizer": True}, like="LoRA"),
    "LoRA, ZeRO-3": Setup(4, 1, {**LORA, "zero": 3}, like="LoRA"),
    "LoRA, all offloaded": Setup(2, 4, {**LORA, **BOTH}, {"offload_frozen": True}, like="LoRA"),
    "LoRA and all weights": Setup(1, 4, LORA_AND_ALL, {"critic": LORA_AND_ALL}),
    "LoRA and all weights, ZeRO-3": Setup(
        2, 1, {**LORA_AND_ALL, "zero": 3}, {"critic": {**LORA_AND_ALL, "zero": 2}}, like="LoRA and all weights"
    ),
    "experts": Setup(1, 4, LORA, {"ema": True}, model=EXPERTS),
    "experts, ZeRO-3": Setup(2, 1, {**LORA, "zero": 3}, {"ema": True}, like="experts", model=EXPERTS),
    "experts, tensor parallel": Setup(2, 1, {**LORA, **TENSOR}, {"ema": True}, like="experts", model=EXPERTS),
    "DPO": Setup(1, 1, curves=DPO),
    "DPO, ZeRO-2, reference offloaded": Setup(
        2, 4, {"zero": 2, "offload_optimizer": True, "offload_frozen": True}, like="DPO", curves=DPO
    ),
    "KTO": Setup(1, 1, curves=KTO),
    "KTO, ZeRO-2, accumulated": Setup(2, 4, {"zero": 2}, like="KTO", curves=KTO),
    "KTO, ZeRO-3": Setup(4, 1, {"zero": 3}, like="KTO", curves=KTO),
    "GRPO": Setup(1, 2, curves=GRPO),
    "GRPO, ZeRO-2": Setup(4, 1, {"zero": 2}, like="GRPO", curves=GRPO),
    "GRPO, tensor parallel": Setup(2, 1, TENSOR, like="GRPO", curves=GRPO),
    "tensor parallel": Setup(2, 1, TENSOR),
    "tensor parallel, ZeRO-1": Setup(2, 4, {**TENSOR, "zero": 1}),
    "tensor parallel of two groups": Setup(4, 1, TENSOR),
    "tensor parallel of two groups, ZeRO-2, offloaded": Setup(4, 4, {**TENSOR, "zero": 2, "offload_optimizer": True}),
    "LoRA, tensor parallel of two groups, ZeRO-1": Setup(4, 1, {**TENSOR, **LORA, "zero": 1}, like="LoRA"),
    "DPO, tensor parallel": Setup(2, 1, {**TENSOR, "activation_checkpointing": True}, like="DPO", curves=DPO),
    "sequence parallel": Setup(2, 1, SEQUENCE),
    "LoRA, sequence parallel of two groups, ZeRO-3": Setup(4, 1, {**SEQUENCE, **LORA, "zero": 3}, like="LoRA"),
    "DPO, sequence parallel, ZeRO-2": Setup(
        2, 4, {**SEQUENCE, "zero": 2, "activation_checkpointing": True}, like="DPO", curves=DPO
    ),
    "GRPO, sequence parallel of two groups, ZeRO-1": Setup(4, 1, {**SEQUENCE, "zero": 1}, like="GRPO", curves=GRPO),
    "long passes": Setup(1, 1, LONG, **LONG_SFT),
    "long passes, chunked MLP": Setup(1, 1, CHUNKED, **LIKE_LONG),
    "long passes, chunked MLP, ZeRO-3": Setup(2, 1, {**CHUNKED_HALVES, "zero": 3}, **LIKE_LONG),
    "long passes, chunked MLP, recomputed, ZeRO-3": Setup(
        2, 1, {**CHUNKED_HALVES, "zero": 3, "activation_checkpointing": True}, **LIKE_LONG
    ),
    "long passes, chunked MLP, tensor parallel": Setup(2, 1, {**CHUNKED, **TENSOR}, **LIKE_LONG),
    "long passes, chunked MLP, sequence parallel": Setup(2, 1, {**CHUNKED, **SEQUENCE}, **LIKE_LONG),
    # Half precision rounds weights to three digits; PPO then samples other responses, and fp16 skips steps
    # that overflow.
    "SFT alone": Setup(1, 1, curves={"sft": CURVES["sft"]}),
    "bf16": Setup(2, 1, {"zero": 2, "precision": "bf16"}, **HALF),
    "bf16, all offloaded": Setup(2, 4, {**BOTH, "precision": "bf16"}, **HALF),
    "bf16, not sharded": Setup(1, 1, {"precision": "bf16"}, **HALF),
    "bf16, tensor parallel": Setup(2, 1, {**TENSOR, "precision": "bf16"}, **HALF_NORMS),
    "bf16, sequence parallel, ZeRO-2": Setup(2, 1, {**SEQUENCE, "zero": 2, "precision": "bf16"}, **HALF_NORMS),
    "fp16, tensor parallel, ZeRO-1": Setup(2, 1, {**TENSOR, "zero": 1, "precision": "fp16"}, **HALF_NORMS),
    "fp16": Setup(2, 4, {"zero": 1, "precision": "fp16"}, **HALF),
    "fp16, optimizer offloaded": Setup(2, 1, {"zero": 2, "precision": "fp16", "offload_optimizer": True}, **HALF),
}  # fmt: skip


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """The chain, run in every setup."""
    folder = tmp_path_factory.mktemp("chains")
    runs = {name: setup.make(folder / f"{number}") for number, (name, setup) in enumerate(SETUPS.items())}
    for ranks in (1, 2, 4):
        # DeepSpeed keeps its process groups for the lifetime of a process.
        names = sorted(
            (name for name in SETUPS if SETUPS[name].ranks == ranks and tiny.is_supported(name)),
            key=lambda name: SETUPS[name].layer_group,
        )
        run_chains([runs[name] for name in names], ranks)
    return runs


def curve(run: RunDir, stage: str, name: str) -> list[float]:
    return [line[name] for line in metrics(run, stage) if line["kind"] == "train"]


@pytest.mark.parametrize("name", [name for name in SETUPS if name not in {setup.like for setup in SETUPS.values()}])
def test_curves_agree(chains: dict[str, RunDir], name: str) -> None:
    tiny.skip_unless_supported(name)
    setup = SETUPS[name]
    for stage, numbers in setup.curves.items():
        for number in numbers:
            ours, theirs = curve(chains[name], stage, number), curve(chains[setup.like], stage, number)
            assert len(ours) == STEPS[stage]
            assert ours == pytest.approx(theirs, rel=setup.tolerance, abs=setup.tolerance), (stage, number)


@pytest.mark.parametrize("name", ["experts, ZeRO-3", "experts, tensor parallel"])
def test_adapted_experts_are_exported_with_their_averages(chains: dict[str, RunDir], name: str) -> None:
    """Merged weights, and the average of the updates, of sharded factors as of whole ones."""
    for part in ("sft/model", "ppo/model", "ppo/model/ema"):
        ours, theirs = (
            load_file(chains[setup].path / "stages" / part / "model.safetensors") for setup in (name, "experts")
        )
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tensor parallel", "tensor parallel of two groups, ZeRO-2, offloaded"])
def test_tensor_parallel_models_are_exported_completely(chains: dict[str, RunDir], name: str) -> None:
    for stage in CURVES:
        ours, theirs = (load_file(chains[setup].stage(stage).model / "model.safetensors") for setup in (name, "plain"))
        assert {key: weight.shape for key, weight in ours.items()} == {
            key: weight.shape for key, weight in theirs.items()
        }
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, atol=3e-5, rtol=1e-4)


def test_adapters_train_differently_from_all_weights(chains: dict[str, RunDir]) -> None:
    ends = [curve(chains[name], "sft", "loss")[-1] for name in ("plain", "LoRA", "LoRA and all weights")]
    starts = [curve(chains[name], "sft", "loss")[0] for name in ("plain", "LoRA", "LoRA and all weights")]
    assert len(set(ends)) == 3
    assert starts == pytest.approx([starts[0]] * 3)
    assert max(ends) < starts[0]
