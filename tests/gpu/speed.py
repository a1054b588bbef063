"""Rollout and training speed, beside transformers and a plain DeepSpeed loop on the same tokens."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine, bytes_per_token
from hpc_rlhf.train.runtime.world import World, join, leave
from tests.gpu.attention import attention
from tests.gpu.scale import (
    SCALES,
    Scale,
    new_model,
    padded,
    peak_bandwidth,
    peak_flops,
    peak_gib,
    reset_memory,
    rollout_request,
    seconds,
)  # fmt: skip
from tests.gpu.training import training


def rollouts(scale: Scale, world: World, bandwidth: float) -> tuple[dict[str, Any], bool]:
    """Generated tokens per second of each side, and whether CUDA graphs change no token.

    Args:
        bandwidth: bytes per second.
    """
    request = rollout_request(scale)
    tokens = scale.prompts * scale.new_tokens
    model = new_model(scale, world, torch.bfloat16)
    results: dict[str, Any] = {}
    responses = []
    for side, may_record in (("ours", True), ("ours without CUDA graphs", False)):
        reset_memory()
        engine = RolloutEngine(model, world)
        engine.step.may_record = engine.step.may_record and may_record
        whole, prefill = (
            seconds(partial(engine.generate, each), 2) for each in (request, replace(request, max_new_tokens=1))
        )
        share = read_bytes(scale, model, request) / bandwidth / (whole - prefill)
        results[side] = {"rate": tokens / whole, "peak_gib": peak_gib(), "bandwidth_share": share}
        responses.append(engine.generate(request).responses)
        assert all(len(response) == scale.new_tokens for response in responses[-1])

    def theirs() -> None:
        for start in range(0, scale.prompts, scale.rows):
            ids, mask = padded(request.prompts[start : start + scale.rows], world, left=True)
            model.generate(
                ids, attention_mask=mask, max_new_tokens=scale.new_tokens, min_new_tokens=scale.new_tokens,
                do_sample=True, top_k=0, top_p=1.0, pad_token_id=1,
            )  # fmt: skip

    reset_memory()
    with torch.no_grad():
        results["transformers"] = {"rate": tokens / seconds(theirs, 1), "peak_gib": peak_gib()}
    return results, responses[0] == responses[1]


def read_bytes(scale: Scale, model: Any, request: GenerationRequest) -> int:
    """Bytes that the decode steps of a rollout must read: the weights in each step, and the keys and values that each
    row has by then. The first token of a response comes from the prefill."""
    steps = range(1, scale.new_tokens)
    weights = sum(parameter.nbytes for parameter in model.parameters()) * len(steps) * -(-scale.prompts // scale.rows)
    return weights + bytes_per_token(model) * sum(len(prompt) + step for prompt in request.prompts for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=SCALES, required=True)
    options = parser.parse_args()
    scale, world = SCALES[options.scale], join(1)
    flops, bandwidth = peak_flops(scale, world), peak_bandwidth(scale, world)
    rates, same = rollouts(scale, world, bandwidth)
    results = {
        "peak_tflops": flops / 1e12, "bandwidth_tb_s": bandwidth / 1e12, "rollout": rates,
        "same_tokens_with_cuda_graphs": same, "attention": attention(scale, world),
        "training": training(scale, world, options.out, flops),
    }  # fmt: skip
    (options.out / "speed.json").write_text(json.dumps(results, indent=1))
    leave()
    if not same:
        raise SystemExit("CUDA graphs change the sampled tokens")
    print("measured; CUDA graphs change no token" if world.device.type == "cuda" else "measured on a CPU")


if __name__ == "__main__":
    main()
