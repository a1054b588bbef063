"""What the GPU check measures, and how: an OPT with 1.3 billion weights, or a tiny one."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.runtime.world import World

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


def rollout_request(scale: Scale) -> GenerationRequest:
    """The rollout of every side: responses of the same length to prompts of different ones."""
    prompts = sequences(scale, scale.prompts, scale.longest, seed=2)
    keys: list[tuple[object, ...]] = [("speed", row) for row in range(len(prompts))]
    return GenerationRequest(prompts, scale.new_tokens, NEVER, keys=keys, max_batch=scale.rows)


def padded(rows: Sequence[Sequence[int]], world: World, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64, (rows, longest); 1 in the mask on real tokens."""
    width = max(map(len, rows))
    ids = [[*[1] * (width - len(row)), *row] if left else [*row, *[1] * (width - len(row))] for row in rows]
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


def peak_bandwidth(scale: Scale, world: World) -> float:
    """Bytes per second that a copy reads and writes on this device."""
    source, target = (torch.zeros(scale.side, scale.side, device=world.device) for _ in "ab")
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 10)
