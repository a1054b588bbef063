"""Decoding with continuous batching: when a response is finished, the next prompt takes its row.

A token is drawn by a pure function of its logits and one uniform number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.kv_cache import Rows, make_rows
from hpc_rlhf.train.runtime import seeds

# Prompt tokens that go through the model at once, to bound their activations.
PREFILL_TOKENS = 8192

# Free rows wait until this fraction of all rows is free, so that new prompts share a forward pass.
REFILL_FRACTION = 8

# The largest fraction whose product with a sum does not round up to the sum.
LARGEST_FRACTION = 1 - 2**-52

# Number of likeliest tokens to try for top_p before sorting all.
NUCLEUS = 512


@torch.no_grad()
def decode(
    step: DecodeStep, request: GenerationRequest, before: Callable[[], object] = lambda: None
) -> Iterator[list[tuple[int, int]]]:
    """Responses to prompts token by token, each up to its first EOS or the length limit.

    Which rows share a forward pass depends only on the prompts and the drawn tokens, so a repeated rollout has the same
    bits. The longest prompts come first. Responses of a group that begin together share their prompt's pass through the
    model. When a row ends and no prompt is waiting, it leaves the batch.

    Args:
        step: of a causal language model in eval mode.
        before: called before each forward pass.

    Yields:
        For each forward pass, pairs of a prompt's number and its next token.
    """
    prompts, limit, sampling = request.prompts, request.max_new_tokens, request.sampling
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
    rows = request.max_batch
    batch = make_rows(step, min(rows, len(prompts)), max(map(len, prompts), default=0) + limit, before)
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
                new, logits = _begin(batch, first, _next_prompts(waiting, request, rows - first), request)
                live += new
                counts += [0] * len(new)
                started = limit * torch.tensor(new, device=last.device)
                next_random = torch.cat([next_random, started])
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


def _next_prompts(waiting: deque[int], request: GenerationRequest, free: int) -> list[int]:
    """Take prompts for free rows, at least one, as many as go through the model at once."""
    numbers: list[int] = []
    tokens = 0
    while waiting and len(numbers) < free:
        if not numbers or waiting[0] // request.group_size != numbers[-1] // request.group_size:
            tokens += len(request.prompts[waiting[0]])
            if numbers and tokens > PREFILL_TOKENS:
                break
        numbers.append(waiting.popleft())
    return numbers


def _begin(batch: Rows, first: int, numbers: list[int], request: GenerationRequest) -> tuple[list[int], Tensor]:
    """Put prompts into rows from ``first`` on, each group's prompt by one pass through the model and copies.

    Returns:
        The numbers in the order of their rows, one of each group first, and the next logits (rows, vocabulary).
    """
    one_of = {number // request.group_size: number for number in numbers}
    begun = list(one_of.values())
    logits = batch.begin(first, [request.prompts[number] for number in begun])
    others = [number for number in numbers if one_of[number // request.group_size] != number]
    if others:
        place_of = {group: place for place, group in enumerate(one_of)}
        places = [place_of[number // request.group_size] for number in others]
        batch.copy([first + place for place in places], range(first + len(begun), first + len(numbers)))
        logits = torch.cat([logits, logits[places]])
    return begun + others, logits


def uniforms(keys: Sequence[tuple[object, ...]], length: int) -> Tensor:
    """The numbers that a batch's responses are drawn with, each row from its own seed.

    So a response depends on its key and on the model, not on the batch that its prompt is in.

    Args:
        keys: what seeds each row.

    Returns:
        (batch, length), float64, in [0, 1).
    """
    rows = torch.empty(len(keys), length, dtype=torch.float64)
    for row, key in zip(rows, keys, strict=True):
        torch.rand(length, generator=torch.Generator().manual_seed(seeds.derive(*key)), out=row)
    return rows


def draw(logits: Tensor, uniform: Tensor | None, temperature: float, top_p: float, top_k: int) -> Tensor:
    """A token for each row: the likeliest, or one drawn by inverting the cumulative distribution.

    Args:
        logits: (batch, vocabulary).
        uniform: (batch,), in [0, 1); None takes the likeliest token.
        temperature, top_p, top_k: as in ``Sampling``.

    Returns:
        (batch,), int64.
    """
    if uniform is None:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() if temperature == 1 else logits.float() / temperature, dim=-1)
    if not top_k and top_p >= 1:
        return _invert(probabilities, uniform).squeeze(1)
    likeliest, tokens = _likeliest(probabilities, top_p, top_k)
    return tokens.gather(1, _invert(likeliest, uniform)).squeeze(1)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Where each row's cumulative distribution first exceeds a fraction of its sum: (batch, 1), int64.

    Args:
        probabilities: (batch, n), up to a factor.
        uniform: (batch,), the fractions; 1 gives the last possible token.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    fractions = uniform.clamp(max=LARGEST_FRACTION).unsqueeze(1)
    return torch.searchsorted(cumulative, fractions * cumulative[:, -1:], right=True)


def _likeliest(probabilities: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, ties in vocabulary order.

    Returns:
        Probabilities (batch, n), 0 where a token is not kept, and tokens (batch, n).
    """
    likeliest, tokens = probabilities.topk(min(top_k or NUCLEUS, probabilities.shape[1]), dim=-1)
    total = (likeliest if top_k else probabilities).sum(dim=-1, keepdim=True, dtype=torch.float64)
    # More tokens may tie with the last one found.
    certain = likeliest.double().where(likeliest > likeliest[:, -1:], 0.0).sum(dim=-1, keepdim=True)
    if top_k or bool((certain > (top_p + 1e-6) * total).all()):
        tokens, order = tokens.sort(dim=-1)
        likeliest, order = likeliest.gather(1, order).sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(1, order)
    else:
        likeliest, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        # A token stays if those before it do not reach top_p.
        before = likeliest.cumsum(dim=-1, dtype=torch.float64) - likeliest.double()
        likeliest = likeliest.where(before < top_p * total, 0.0)
    return likeliest, tokens
