"""Packed attention by flash attention for varying lengths, beside one call per sequence."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hpc_rlhf.train.models import packed_attention, varlen
from hpc_rlhf.train.runtime.world import World
from tests.gpu.scale import Scale, seconds, sequences


def attention(scale: Scale, world: World) -> dict[str, Any]:
    """Milliseconds of a layer's attention with its gradients, and the largest error against float32, of each side.

    Without the kernel, as on a CPU, only the loop is measured.

    Raises:
        SystemExit: the kernel is less accurate than the loop.
    """
    lengths = tuple(map(len, sequences(scale, scale.sequences, 2 * scale.longest, seed=3)))
    heads = scale.shape["num_attention_heads"]
    shape = (1, sum(lengths), heads, scale.shape["hidden_size"] // heads)
    torch.manual_seed(4)
    single, weight = [torch.randn(shape, device=world.device).transpose(1, 2) for _ in "qkv"], torch.randn(shape)

    def attend(inputs: list[Tensor]) -> list[Tensor]:
        query, key, value = inputs
        output, _ = packed_attention.attention(None, query, key, value, None, packed_lengths=lengths)
        return [output.detach(), *torch.autograd.grad(output, inputs, weight.to(output))]

    half = [each.bfloat16().requires_grad_() for each in single]
    exact = attend([each.detach().float().requires_grad_() for each in half])
    sides: dict[str, Any] = {"loop": patch.object(varlen, "runs_on", lambda device: False)}
    if varlen.supports(half[0], half[1], half[2], 0.0):
        sides["varlen"] = nullcontext()
    results: dict[str, Any] = {}
    for side, context in sides.items():
        with context:
            error = max(float((one - other).abs().max()) for one, other in zip(attend(half), exact, strict=True))
            results[side] = {"ms": 1e3 * seconds(lambda: attend(half), scale.steps), "error": error}
    if any(side["error"] > 2 * results["loop"]["error"] for side in results.values()):
        raise SystemExit(f"flash attention for varying lengths gives other numbers: {results}")
    return results
