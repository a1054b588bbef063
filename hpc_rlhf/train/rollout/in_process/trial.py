"""Before the first rollout: decode steps must give what whole passes of the same model give."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.train.models.agreement import random_sequences, tolerance, undisturbed
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.kv_cache import BatchedRows, Rows, SingleRows, WholeRows, may_batch

# Two sequences, and how many of their tokens are the prompts.
LENGTHS = (13, 20)
PROMPTS = (5, 12)

SLOWER: dict[type[Rows], str] = {SingleRows: "row by row", WholeRows: "by whole passes, without a cache"}


def choose(step: DecodeStep, agree: Callable[[int], int], is_main: bool) -> None:
    """Let a model be decoded in the ways that agree with its whole passes, the fastest first.

    Args:
        step: its model has its weights.
        agree: the largest of the ranks' numbers, if these make their passes together.
    """
    model = step.model
    ways: list[type[Rows]] = [BatchedRows] if may_batch(model, max(LENGTHS)) else []
    until_traced, step.steps_to_trace = step.steps_to_trace, -1  # these steps do not count
    with undisturbed(model.device):
        sequences = random_sequences(model.config, LENGTHS, model.device)
        whole = [_logits(model, sequence) for sequence in sequences]
        trusted = [way for way in (*ways, SingleRows) if not agree(not _agrees(way, step, sequences, whole))]
    step.steps_to_trace = until_traced
    step.ways = (*trusted, WholeRows)
    expected = ways[0] if ways else SingleRows
    if is_main and step.ways[0] is not expected:
        print(
            f"hpc-rlhf: {model.config.model_type}: responses are decoded {SLOWER[step.ways[0]]}, which is slower, "
            "because faster steps give other numbers",
            file=sys.stderr,
            flush=True,
        )


def _logits(model: Any, sequence: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=sequence.unsqueeze(0), use_cache=False).logits[0]
    return logits.double()


def _agrees(way: type[Rows], step: DecodeStep, sequences: list[Tensor], whole: list[Tensor]) -> bool:
    """Whether a way gives the logits of whole passes after the prompts; the last ones alone, in another row."""
    if way is SingleRows and _loses_limit(step.model):
        return False
    begun = [min(prompt, len(sequence) - 1) for prompt, sequence in zip(PROMPTS, sequences, strict=True)]
    try:
        rows = way(step, len(sequences), max(LENGTHS))
        got = [rows.begin(0, [each[:prompt].tolist() for each, prompt in zip(sequences, begun, strict=True)])]
        numbers = list(range(len(sequences)))
        wanted = [torch.stack([whole[row][begun[row] - 1] for row in numbers])]
        for steps in range(max(len(each) - prompt for each, prompt in zip(sequences, begun, strict=True)) - 1):
            places = [prompt + steps for prompt in begun]
            if steps == 2:
                rows.copy([1], [0])
                numbers = [1, 1]
            elif steps == 4:
                rows.move(1, 0)
                numbers = [1]
            got.append(rows.step(torch.stack([sequences[row][places[row]] for row in numbers])))
            wanted.append(torch.stack([whole[row][places[row]] for row in numbers]))
    except Exception:  # an architecture may object to its cache in any way
        return False
    actual, right = torch.cat(got).double(), torch.cat(wanted)
    spread = (right - right.mean(dim=1, keepdim=True)).norm(dim=1)
    difference = actual - right
    difference = (difference - difference.mean(dim=1, keepdim=True)).norm(dim=1)
    return bool((difference <= tolerance(step.model.dtype) * spread + 1e-6 * right.norm(dim=1)).all())


def _loses_limit(model: Any) -> bool:
    """True if a state-space layer limits its time steps from below, which transformers' steps with a cache do not."""
    return any(getattr(layer, "time_step_limit", (0.0,))[0] > 0 for layer in model.modules())
