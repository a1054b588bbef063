"""``make plan-check``: the memory that ``hpc-rlhf plan`` estimates, against the measured peak of the stages' tensors.

Real stages train on rows of the greatest length, on this machine's CPU, and every rank counts its live tensors.
DeepSpeed's own estimate, of weights, gradients and optimizer alone, stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_rlhf.estimate.parameters import architecture
from hpc_rlhf.estimate.stage_memory import Memory, stage_memory
from hpc_rlhf.rank import exit_after
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from tests.train.ranks import start, wait
from tests.train.stages import make_run

# Tolerated errors of an estimate: over and under.
OVER, UNDER = 0.15, 0.05
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A stage to measure.

    Attributes:
        kind: model type.
        layers, width, vocabulary: sizes of the model.
        longest: tokens of a prompt, and of a response.
        fields: fields of the stage.
    """

    stage: str
    kind: str
    layers: int
    width: int
    vocabulary: int
    longest: int
    ranks: int = 1
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        said = ", ".join(f"{name} {_brief(value)}" for name, value in self.fields.items() if name not in VERIFIED)
        size = f"{self.kind} {self.layers} x {self.width}, {self.vocabulary} tokens"
        return f"{self.stage}, {size}, {2 * self.longest} long, {self.ranks} ranks, {said}"

    def spec(self, folder: Path) -> JobSpec:
        heads, positions = self.width // 64, max(512, 2 * self.longest)
        shapes: dict[str, dict[str, Any]] = {
            "opt": {"ffn_dim": 4 * self.width, "word_embed_proj_dim": self.width, "dropout": 0.0},
            "gpt2": {"n_embd": self.width, "n_layer": self.layers, "n_head": heads, "n_positions": positions},
            "gpt_neox": {"intermediate_size": 4 * self.width},
        }
        like_llama = {"intermediate_size": 8 * self.width // 3, "num_key_value_heads": max(1, heads // 2)}
        model = {"model_type": self.kind, "vocab_size": self.vocabulary, **shapes.get(self.kind, like_llama)}
        if self.kind != "gpt2":
            sizes = {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": heads}
            model = {**model, **sizes, "max_position_embeddings": positions}
        stages = {self.stage: {"max_steps": 3, "epochs": 100, "checkpoint_every": 10**6, **self.fields}}
        if self.stage == "ppo":
            stages["reward"] = {"micro_batch": 1, "max_steps": 1}
        return JobSpec.model_validate(
            {
                "name": "peak", "run_dir": str(folder / "run"), "seed": 7, "stages": stages,
                "slurm": {"gpus_per_node": 0, "ranks_per_node": self.ranks},
                "data": {
                    "sources": [{"demo": 400}], "held_out": 0,
                    "max_prompt_tokens": self.longest, "max_answer_tokens": self.longest,
                },
                "models": {"actor": {"from_scratch": model}},
            }
        )  # fmt: skip


def _brief(value: Any) -> str:
    return " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


# GRPO with groups of four responses, and a reward without a model.
VERIFIED: dict[str, Any] = {"group_size": 4, "rewards": ({"format": ".*a.*"},)}
CHUNKED = {"chunked_mlp": True, "activation_checkpointing": True}
PIPELINE = {"micro_batch": 2, "global_batch": 16, "pipeline_parallel": 2}

CASES = (
    Case("sft", "llama", 4, 256, 2048, 128, fields={"micro_batch": 4}),
    Case("sft", "llama", 4, 512, 8192, 128, 2, {"micro_batch": 4, "zero": 1, "global_batch": 16}),
    Case("sft", "opt", 6, 384, 4096, 128, 2, {"micro_batch": 2, "zero": 2}),
    Case("sft", "qwen2", 4, 512, 16384, 64, 2, {"micro_batch": 4, "zero": 3, "global_batch": 16}),
    Case("sft", "gpt2", 6, 384, 4096, 128, fields={"micro_batch": 8, "lora": {"rank": 16}}),
    Case("sft", "gpt_neox", 4, 384, 4096, 128, 2, {"micro_batch": 8, "zero": 2, "precision": "fp32"}),
    Case("sft", "llama", 12, 256, 2048, 256, fields={"micro_batch": 8, "activation_checkpointing": True}),
    Case("sft", "llama", 8, 256, 2048, 128, 2, {**PIPELINE, "zero": 1}),
    Case("sft", "opt", 8, 256, 2048, 128, 2, {**PIPELINE, "precision": "fp32", "activation_checkpointing": True}),
    Case("sft", "llama", 2, 256, 1024, 4096, 2, {"micro_batch": 1, "precision": "fp32", "sequence_parallel": 2}),
    Case("sft", "llama", 4, 256, 1024, 1024, fields={"micro_batch": 8, "precision": "fp32", "chunked_mlp": True}),
    Case("sft", "gpt2", 4, 256, 1024, 1024, fields={"micro_batch": 8, "precision": "fp32", **CHUNKED}),
    Case("sft", "llama", 3, 768, 8192, 128, 2, {"micro_batch": 4, "tensor_parallel": 2}),
    Case("sft", "opt", 4, 256, 16384, 64, 2, {"micro_batch": 4, "precision": "fp32", "tensor_parallel": 2, "zero": 1}),
    Case("sft", "llama", 4, 768, 4096, 128, 4, {**PIPELINE, "precision": "fp32", "tensor_parallel": 2}),
    Case("reward", "llama", 6, 384, 2048, 128, 2, {"micro_batch": 4, "zero": 1}),
    Case("reward", "opt", 4, 256, 8192, 128, 2, {"micro_batch": 4, "precision": "fp32", "tensor_parallel": 2}),
    Case("sft", "opt", 4, 384, 4096, 64, 2, {"micro_batch": 8, "zero": 3, "lora": {"rank": 8}}),
    Case("dpo", "opt", 4, 384, 4096, 64, 2, {"micro_batch": 4, "zero": 3, "lora": {"rank": 8}}),
    Case("dpo", "llama", 4, 384, 8192, 64, fields={"micro_batch": 4, "global_batch": 8}),
    Case("ppo", "llama", 4, 256, 2048, 64, fields={"micro_batch": 4, "global_batch": 8}),
    Case("ppo", "opt", 4, 384, 4096, 64, 2, {"micro_batch": 2, "zero": 3, "ema": True, "global_batch": 16}),
    Case("grpo", "llama", 4, 256, 2048, 64, fields={"micro_batch": 8, **VERIFIED}),
    Case(
        "grpo",
        "qwen2",
        4,
        384,
        8192,
        64,
        2,
        {"micro_batch": 4, "zero": 2, "kl_coef": 0.1, "global_batch": 32, **VERIFIED},
    ),
    Case(
        "grpo",
        "opt",
        4,
        384,
        4096,
        64,
        2,
        {"micro_batch": 4, "zero": 3, "kl_coef": 0.1, "lora": {"rank": 8}, "global_batch": 32, **VERIFIED},
    ),
)


def estimate(case: Case, folder: Path) -> Memory:
    return stage_memory(case.spec(folder), case.stage)


def measure(case: Case, folder: Path) -> int:
    """The peak bytes of tensors on a rank in the steps after the first."""
    run = make_run(case.spec(folder))
    for stage in ("reward", "ppo") if case.stage == "ppo" else (case.stage,):
        logs = [folder / f"{rank}.log" for rank in range(case.ranks)]
        wait(start(["-m", "tests.benchmarks.plan_peaks", "--rank", str(run.path), stage], logs), logs)
    return max(json.loads(path.read_text()) for path in run.stage(case.stage).path.glob("peak-*.json"))


def longest_rows(size: int) -> None:
    """Make every prompt and every response of the data this long, in this process."""
    from hpc_rlhf.train.data import tokenized
    from hpc_rlhf.train.data.dialogues import Tokens

    def encode(chunk: Sequence[Any], tokenizer: Any, *answers: str, ends: bool) -> Iterator[Tokens]:
        for number, _ in enumerate(chunk):
            ids = [40 + (number * 7 + i * i) % 200 for i in range(size)]
            yield Tokens(ids, [ids] * len(answers), {})

    tokenized.encode = encode  # type: ignore[assignment]


def _rank(path: str, stage: str) -> None:
    """Run one rank of a stage on rows of the greatest length, counting every tensor."""
    from hpc_rlhf.train import context
    from hpc_rlhf.train.entry import run_stage
    from hpc_rlhf.train.metrics import MetricsLog
    from tests.benchmarks.allocations import Allocations

    run = RunDir(Path(path))
    longest_rows(read_spec(run.job_yaml).data.max_prompt_tokens)
    meter, peaks = Allocations(explained=1 if "EXPLAIN" in os.environ else None), []

    class Counting(MetricsLog):
        def log(self, step: int, total_steps: int, kind: str, values: Any) -> None:
            super().log(step, total_steps, kind, values)
            if kind == "train":
                peaks.append(meter.peak)
                meter.peak = meter.live
                if step == total_steps and meter.at_peak:
                    for maker, size in meter.at_peak.most_common(40):
                        print(f"{size / MIB:9.2f} {maker}", file=sys.stderr)

    context.MetricsLog = Counting  # type: ignore[misc]
    with meter:
        run_stage(path, stage)
    (run.stage(stage).path / f"peak-{os.environ['RANK']}.json").write_text(str(max(peaks[1:], default=0)))


def theirs(case: Case, folder: Path) -> int:
    """Bytes of weights, gradients and optimizer of the trained models, by DeepSpeed's estimators."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    spec = case.spec(folder)
    model = architecture(spec.models, "actor")
    if case.fields.get("zero") == 3:
        _, bytes_, _ = estimate_zero3_model_states_mem_needs(
            model.parameters, model.largest, case.ranks, 1, cpu_offload=False
        )
    else:
        bytes_, _ = estimate_zero2_model_states_mem_needs(model.parameters, case.ranks, 1, cpu_offload=False)
    return int(bytes_)


def compare(cases: Sequence[Case]) -> list[float]:
    """Print a line per case; returns estimate / measured for each."""
    ratios = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="hpc-rlhf-plan-") as name:
            folder = Path(name)
            found, said = measure(case, folder), estimate(case, folder)
            ratios.append(said.held / found)
            print(
                f"{said.held / MIB:8.1f} {found / MIB:8.1f} {ratios[-1]:6.2f} "
                f"{theirs(case, folder) / MIB:8.1f}  {case}  (most in {said.fullest})",
                flush=True,
            )
            if "EXPLAIN" in os.environ:
                print({part: round(size / MIB, 2) for part, size in said.parts.items()})
                print((folder / "log").read_text()[-3500:])
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plan_peaks", description=__doc__)
    parser.add_argument("--rank", nargs=2, metavar=("RUN", "STAGE"), help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases, from 0")
    args = parser.parse_args()
    if args.rank:
        exit_after(lambda: _rank(*args.rank))
    print("MiB: estimate, measured, ratio, DeepSpeed's estimate")
    ratios = compare([CASES[number] for number in args.only] if args.only else CASES)
    wrong = [ratio for ratio in ratios if not 1 - UNDER <= ratio <= 1 + OVER]
    print(f"{len(ratios) - len(wrong)} of {len(ratios)} within {OVER:.0%} over and {UNDER:.0%} under")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
