"""Decoding with continuous batching: a finished answer leaves its row to the next prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.kv_cache import make_rows
from hpc_rlhf.train.rollout.in_process.sampling import Sampling, draw

# Prompt tokens that go through the model at once, so that their activations stay small.
PROMPT_TOKENS = 8192

# Rows wait for new prompts until one in so many is free, so that the prompts share a forward pass.
REFILLED = 8


@torch.no_grad()
def decode(
    step: DecodeStep, prompts: list[list[int]], uniforms: Tensor | None, max_tokens: int, sampling: Sampling,
    eos_id: int, rows: int, before: Callable[[], object] = lambda: None,
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Answers to prompts as they grow, each ended by its first EOS or at its longest.

    Which rows share a forward pass follows from the prompts and the tokens drawn alone, so that a rollout made
    again is the same bit for bit. The longest prompts come first. A row that ends with nothing left to take its
    place is dropped from the batch.

    Args:
        step: of a causal language model in eval mode.
        prompts: token ids, none empty.
        uniforms: (prompts, max_tokens) of ``sampling.uniforms``; not needed when greedy.
        max_tokens: longest answer, EOS included.
        rows: prompts that are answered at the same time, at most.
        before: called before each forward pass.

    Yields:
        What a forward pass gave: pairs of a prompt's number and its next token.
    """
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
    batch = make_rows(step, min(rows, len(prompts)), max(map(len, prompts), default=0) + max_tokens)
    live: list[int] = []  # which prompt each row answers
    drawn: list[int] = []  # tokens drawn in each row
    last = torch.empty(0, dtype=torch.int64, device=step.model.device)  # the latest in each row
    chances = None if uniforms is None or sampling.greedy else uniforms.to(last.device).flatten()
    chance = last  # where in them each row's next one is
    with step.ready():
        while waiting or live:
            before()
            first = len(live)
            if waiting and rows - first >= max(1, rows // REFILLED):
                live += _next(waiting, prompts, rows - first)
                drawn += [0] * (len(live) - first)
                chance = torch.cat([chance, max_tokens * torch.tensor(live[first:], device=last.device)])
                logits = batch.begin(first, [prompts[number] for number in live[first:]])
            else:
                first = 0
                logits = batch.step(last)
            uniform = None if chances is None else chances.take(chance[first:])
            tokens = draw(logits, uniform, sampling.temperature, sampling.top_p, sampling.top_k)
            chance[first:] += 1
            last = torch.cat([last[:first], tokens]) if first else tokens
            said = tokens.tolist()
            yield list(zip(live[first:], said, strict=True))
            for row in reversed(range(first, len(live))):
                drawn[row] += 1
                if said[row - first] == eos_id or drawn[row] == max_tokens:
                    end = len(live) - 1
                    if row < end:
                        batch.move(end, row)
                        live[row], drawn[row] = live[end], drawn[end]
                        last[row], chance[row] = last[end], chance[end]
                    del live[end], drawn[end]
            last, chance = last[: len(live)], chance[: len(live)]


def _next(waiting: deque[int], prompts: list[list[int]], free: int) -> list[int]:
    """Take the next prompts for so many free rows, one at least, as far as they go through the model at once."""
    taken = [waiting.popleft()]
    tokens = len(prompts[taken[0]])
    while waiting and len(taken) < free and tokens + len(prompts[waiting[0]]) <= PROMPT_TOKENS:
        taken.append(waiting.popleft())
        tokens += len(prompts[taken[-1]])
    return taken
