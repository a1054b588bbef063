"""Decoding with continuous batching: when a response is finished, the next prompt takes its row."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.kv_cache import make_rows
from hpc_rlhf.train.rollout.in_process.sampling import draw, uniforms

# Prompt tokens that go through the model at once, to bound their activations.
PREFILL_TOKENS = 8192

# Free rows wait until this fraction of all rows is free, so that new prompts share a forward pass.
REFILL_FRACTION = 8


@torch.no_grad()
def decode(
    step: DecodeStep, request: GenerationRequest, before: Callable[[], object] = lambda: None
) -> Iterator[list[tuple[int, int]]]:
    """Responses to prompts token by token, each up to its first EOS or the length limit.

    Which rows share a forward pass depends only on the prompts and the drawn tokens, so a repeated rollout has the same
    bits. The longest prompts come first. When a row ends and no prompt is waiting, it leaves the batch.

    Args:
        step: of a causal language model in eval mode.
        before: called before each forward pass.

    Yields:
        For each forward pass, pairs of a prompt's number and its next token.
    """
    prompts, limit, sampling = request.prompts, request.max_new_tokens, request.sampling
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
    rows = request.max_batch
    batch = make_rows(step, min(rows, len(prompts)), max(map(len, prompts), default=0) + limit)
    live: list[int] = []  # the prompt that each row answers
    counts: list[int] = []  # tokens drawn in each row
    last = torch.empty(0, dtype=torch.int64, device=step.model.device)  # the latest token of each row
    randoms = _randoms(request, last.device)
    next_random = last  # index of each row's next number in ``randoms``
    with step.ready():
        while waiting or live:
            before()
            first = len(live)
            if waiting and rows - first >= max(1, rows // REFILL_FRACTION):
                live += _next_prompts(waiting, prompts, rows - first)
                counts += [0] * (len(live) - first)
                started = limit * torch.tensor(live[first:], device=last.device)
                next_random = torch.cat([next_random, started])
                logits = batch.begin(first, [prompts[number] for number in live[first:]])
            else:
                first = 0
                logits = batch.step(last)
            uniform = None if randoms is None else randoms.take(next_random[first:])
            drawn = draw(logits, uniform, sampling.temperature, sampling.top_p, sampling.top_k)
            next_random[first:] += 1
            last = torch.cat([last[:first], drawn]) if first else drawn
            tokens = drawn.tolist()
            yield list(zip(live[first:], tokens, strict=True))
            for row in reversed(range(first, len(live))):
                counts[row] += 1
                if tokens[row - first] == request.eos_id or counts[row] == limit:
                    end = len(live) - 1
                    if row < end:
                        batch.move(end, row)
                        live[row], counts[row] = live[end], counts[end]
                        last[row], next_random[row] = last[end], next_random[end]
                    del live[end], counts[end]
            last, next_random = last[: len(live)], next_random[: len(live)]


def _randoms(request: GenerationRequest, device: torch.device) -> Tensor | None:
    """(prompts * max_new_tokens,), the uniform numbers of all responses; None if greedy."""
    if request.sampling.greedy or request.keys is None:
        return None
    return uniforms(request.keys, request.max_new_tokens).to(device).flatten()


def _next_prompts(waiting: deque[int], prompts: Sequence[Sequence[int]], free: int) -> list[int]:
    """Take prompts for free rows, at least one, as many as go through the model at once."""
    taken = [waiting.popleft()]
    tokens = len(prompts[taken[0]])
    while waiting and len(taken) < free and tokens + len(prompts[waiting[0]]) <= PREFILL_TOKENS:
        taken.append(waiting.popleft())
        tokens += len(prompts[taken[-1]])
    return taken
