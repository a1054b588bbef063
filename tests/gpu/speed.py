"""Rollout and training speed of an OPT with 1.3 billion weights, beside transformers on the same tokens.

Training's MFU follows PaLM (arXiv 2204.02311, appendix B): 6 FLOPs per weight and token plus 12 per layer, width
and position for attention, over the measured rate of a bf16 matrix product. Padding does not count as tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.runtime.world import World, join, leave
from tests.train.stages import make_run

NEVER = -1  # an EOS that is never sampled, so that every response has all its tokens


@dataclass(frozen=True)
class Scale:
    """What is measured.

    Attributes:
        prompts, new_tokens: of a rollout.
        rows: responses generated at the same time.
        sequences: of an optimizer step.
        longest: tokens of the longest prompt, and of half the longest sequence.
        side: of the square matrices whose product gives the device's peak.
    """

    shape: dict[str, Any]
    prompts: int
    new_tokens: int
    rows: int
    sequences: int
    longest: int
    steps: int
    side: int


SCALES = {
    "full": Scale(
        {
            "vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "word_embed_proj_dim": 2048, "max_position_embeddings": 2048,
        },
        prompts=128, new_tokens=128, rows=64, sequences=32, longest=256, steps=8, side=8192,
    ),
    "tiny": Scale(
        {
            "vocab_size": 300, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "word_embed_proj_dim": 32, "max_position_embeddings": 128,
        },
        prompts=6, new_tokens=6, rows=4, sequences=4, longest=16, steps=2, side=128,
    ),
}  # fmt: skip


def new_model(scale: Scale, world: World, dtype: torch.dtype) -> Any:
    """A freshly initialized OPT on the device; the same weights each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model("opt", dropout=0.0, layerdrop=0.0, pad_token_id=1, **scale.shape)
    with world.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def sequences(scale: Scale, count: int, longest: int, seed: int) -> list[list[int]]:
    """Random token ids whose lengths have a long tail, as real dialogues' do."""
    draw = random.Random(seed)
    lengths = [min(longest, max(4, round(longest * draw.lognormvariate(-1.0, 0.7)))) for _ in range(count)]
    return [[draw.randrange(4, scale.shape["vocab_size"]) for _ in range(length)] for length in lengths]


def padded(rows: list[list[int]], world: World, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64, (rows, longest); 1 in the mask on real tokens."""
    width = max(map(len, rows))
    ids = [([1] * (width - len(row)) + row) if left else (row + [1] * (width - len(row))) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    mask = mask if left else [row[::-1] for row in mask]
    return torch.tensor(ids, device=world.device), torch.tensor(mask, device=world.device)


def reset_memory() -> None:
    """Free what the last measurement left, and measure peak memory from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def seconds(work: Callable[[], object], times: int) -> float:
    """The shortest of several timed calls, after one to warm up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(times))


def peak_flops(scale: Scale, world: World) -> float:
    """FLOP/s of a bf16 matrix product on this device."""
    a, b = (torch.randn(scale.side, scale.side, device=world.device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * scale.side**3 / seconds(lambda: a @ b, 10)


def rollouts(scale: Scale, world: World) -> tuple[dict[str, Any], bool]:
    """Generated tokens per second of each side, and whether CUDA graphs change no token."""
    prompts = sequences(scale, scale.prompts, scale.longest, seed=2)
    tokens = scale.prompts * scale.new_tokens
    keys: list[tuple[object, ...]] = [("speed", row) for row in range(len(prompts))]
    model = new_model(scale, world, torch.bfloat16)
    results: dict[str, Any] = {}
    responses = []
    for side, may_record in (("ours", True), ("ours without CUDA graphs", False)):
        reset_memory()
        engine = RolloutEngine(model, world)
        engine.step.may_record = engine.step.may_record and may_record

        def ours(engine: RolloutEngine = engine) -> list[list[int]]:
            request = GenerationRequest(prompts, scale.new_tokens, NEVER, keys=keys, max_batch=scale.rows)
            return engine.generate(request).responses

        results[side] = {"rate": tokens / seconds(ours, 2), "peak_gib": peak_gib()}
        responses.append(ours())
        assert all(len(response) == scale.new_tokens for response in responses[-1])

    def theirs() -> None:
        for start in range(0, len(prompts), scale.rows):
            ids, mask = padded(prompts[start : start + scale.rows], world, left=True)
            model.generate(
                ids, attention_mask=mask, max_new_tokens=scale.new_tokens, min_new_tokens=scale.new_tokens,
                do_sample=True, top_k=0, top_p=1.0, pad_token_id=1,
            )  # fmt: skip

    reset_memory()
    with torch.no_grad():
        results["transformers"] = {"rate": tokens / seconds(theirs, 1), "peak_gib": peak_gib()}
    return results, responses[0] == responses[1]


def training(scale: Scale, world: World, work: Path, peak: float) -> dict[str, Any]:
    """Real tokens per second and MFU of optimizer steps with fp32 Adam states and bf16 arithmetic."""
    rows = sequences(scale, scale.sequences, 2 * scale.longest, seed=3)
    tokens = sum(map(len, rows))
    results: dict[str, Any] = {}

    def measure(side: str, step: Callable[[], object], model: nn.Module) -> None:
        rate = tokens / seconds(step, scale.steps)
        shape = scale.shape
        attention = 12 * shape["num_hidden_layers"] * shape["hidden_size"] * sum(len(r) ** 2 for r in rows) / tokens
        flops = 6 * sum(p.numel() for p in model.parameters()) + attention
        results[side] = {"rate": rate, "peak_gib": peak_gib(), "mfu": rate * flops / peak}

    reset_memory()
    measure("ours", *ours_step(scale, world, work, rows))
    reset_memory()
    measure("transformers", *transformers_step(scale, world, rows))
    return results


def ours_step(scale: Scale, world: World, work: Path, rows: list[list[int]]) -> tuple[Callable[[], object], nn.Module]:
    fields = {
        "name": "speed", "run_dir": str(work / "run"), "slurm": {"gpus_per_node": 0, "ranks_per_node": 1},
        "data": {"sources": [{"demo": 100}]},
        "models": {"actor": {"from_scratch": {"model_type": "opt", **scale.shape}}},
        "stages": {
            "sft": {"lr": 1e-5, "micro_batch": scale.sequences, "global_batch": scale.sequences, "precision": "bf16"}
        },
    }  # fmt: skip
    spec = JobSpec.model_validate(fields)
    config = json.loads(make_run(spec).ds_config("sft").read_text())
    assert spec.stages.sft is not None
    model = LanguageModel(new_model(scale, world, torch.bfloat16))
    engine = engines.training_engine(model, config, spec.stages.sft, 1e-5, 1000)
    batch = Ragged.of(rows, world.device)
    predicted = batch.tail([len(row) - 1 for row in rows])

    def loss() -> Tensor:
        return -engine(batch.ids, batch.lengths, predicted, summed=True)[0] / len(predicted)

    return lambda: engines.optimizer_step(engine, [loss]), model


def transformers_step(scale: Scale, world: World, rows: list[list[int]]) -> tuple[Callable[[], object], nn.Module]:
    """As transformers' Trainer does with ``bf16=True``: fp32 weights, bf16 autocast, fused AdamW, padded rows."""
    model = new_model(scale, world, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids, mask = padded(rows, world, left=False)
    labels = ids.masked_fill(mask == 0, -100)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(world.device.type, torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=SCALES, required=True)
    options = parser.parse_args()
    scale, world = SCALES[options.scale], join(1)
    peak = peak_flops(scale, world)
    rates, same = rollouts(scale, world)
    results = {
        "peak_tflops": peak / 1e12, "rollout": rates, "same_tokens_with_cuda_graphs": same,
        "training": training(scale, world, options.out, peak),
    }  # fmt: skip
    (options.out / "speed.json").write_text(json.dumps(results, indent=1))
    leave()
    if not same:
        raise SystemExit("CUDA graphs change the sampled tokens")
    print("measured; CUDA graphs change no token" if world.device.type == "cuda" else "measured on a CPU")


if __name__ == "__main__":
    main()
