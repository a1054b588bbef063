"""Requests that join and leave a batch at any time get the responses that they would get alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.rollout.backend import Sampling
from hpc_rlhf.train.rollout.in_process import cuda_graphs, open_batch, trial
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.kv_cache import WholeRows
from hpc_rlhf.train.rollout.in_process.open_batch import OpenBatch, Request
from tests.train import tiny
from tests.train.rollout.in_process.test_cuda_graphs import Tape

GREEDY = Sampling(greedy=True)
LENGTHS = (3, 9, 1, 17, 5, 12, 2, 8)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_batch, "COLUMNS", 8)


@pytest.fixture(scope="module", params=["llama", "gpt2", "whole passes"])
def step(request: pytest.FixtureRequest) -> DecodeStep:
    model = tiny.causal("llama" if request.param == "whole passes" else request.param)
    packed_attention.enable(model)
    step = DecodeStep(model)
    trial.choose(step, int, is_main=True)
    if request.param == "whole passes":
        step.ways = (WholeRows,)
    return step


def requests(sampling: Sampling = GREEDY) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    limits = (7, 1, 30, 12, 4, 20, 2, 9)
    return [
        Request(prompt, limit, sampling, (number,))
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]


def respond(batch: OpenBatch, waves: list[list[Request]]) -> Iterator[list[Request]]:
    """Add the requests, a wave before each forward pass, and respond to all."""
    for wave in waves:
        for request in wave:
            batch.add(request)
        yield batch.advance()
    while advanced := batch.advance():
        yield advanced


def alone(step: DecodeStep, request: Request) -> list[int]:
    list(respond(OpenBatch(step, tiny.EOS, 10_000), [[request]]))
    return request.tokens


def by_transformers(model: Any, request: Request) -> list[int]:
    ids = torch.tensor([request.prompt])
    whole = model.generate(ids, do_sample=False, max_new_tokens=request.max_tokens, eos_token_id=tiny.EOS)
    return whole[0, len(request.prompt) :].tolist()


@pytest.mark.parametrize("tokens", [10_000, 100, 47], ids=["much room", "room for three", "room for one"])
def test_responses_are_those_of_the_model_however_requests_come(step: DecodeStep, tokens: int) -> None:
    asked = requests()
    batch = OpenBatch(step, tiny.EOS, tokens)
    list(respond(batch, [asked[:2], [], [], asked[2:3], asked[3:7], [], asked[7:]]))
    assert [it.tokens for it in asked] == [by_transformers(step.model, it) for it in asked]
    assert batch.live == []


def test_sampled_responses_depend_on_nothing_but_their_request(step: DecodeStep) -> None:
    samplings = [Sampling(), Sampling(0.5), Sampling(top_p=0.6), GREEDY]
    mixed = [requests(sampling)[:5] for sampling in samplings]
    expected = [alone(step, request) for sampling in samplings for request in requests(sampling)[:5]]
    list(respond(OpenBatch(step, tiny.EOS, 10_000), mixed))
    assert [request.tokens for row in mixed for request in row] == expected
    assert len({tuple(row[2].tokens) for row in mixed}) > 1


def test_requests_share_forward_passes(step: DecodeStep) -> None:
    asked = requests()
    passes = list(respond(OpenBatch(step, tiny.EOS, 10_000), [asked]))
    assert len(passes) < 30 + len(asked) // 2
    assert max(map(len, passes)) >= 5, "one has a single token, and others end soon"


def test_a_request_that_is_removed_draws_no_more_tokens_and_disturbs_no_other(step: DecodeStep) -> None:
    asked = requests()
    batch = OpenBatch(step, tiny.EOS, 10_000)
    waves = respond(batch, [asked[:5], [], asked[5:]])
    next(waves), next(waves)
    batch.remove(asked[2])
    drawn = list(asked[2].tokens)
    next(waves)
    batch.remove(asked[0])
    batch.remove(asked[0])
    list(waves)
    others = [it for number, it in enumerate(asked) if number not in (0, 2)]
    assert [it.tokens for it in others] == [by_transformers(step.model, it) for it in others]
    assert asked[2].tokens == drawn


def test_a_batch_that_was_cleared_goes_on(step: DecodeStep) -> None:
    batch, again = OpenBatch(step, tiny.EOS, 10_000), requests()
    next(respond(batch, [requests()]))
    batch.clear()
    list(respond(batch, [again]))
    assert [it.tokens for it in again] == [by_transformers(step.model, it) for it in again]


def test_a_long_request_does_not_leave_less_room_for_short_ones() -> None:
    model = tiny.causal("llama")
    packed_attention.enable(model)
    batch = OpenBatch(DecodeStep(model), tiny.EOS, 64)
    list(respond(batch, [[Request([3], 60, GREEDY, ())]]))
    passes = list(respond(batch, [[Request([5], 3, GREEDY, ()) for _ in range(8)]]))
    assert max(map(len, passes)) == 8


def test_recorded_steps_give_the_same_and_are_discarded_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes: list[Tape] = []
    monkeypatch.setattr(cuda_graphs, "recorder", lambda _: tapes.append(Tape()) or tapes[-1])
    model = tiny.causal("llama")
    packed_attention.enable(model)
    batch, asked = OpenBatch(DecodeStep(model, may_trace=True), tiny.EOS, 10_000), requests()
    list(respond(batch, [asked[:2], [], [], asked[2:3], asked[3:7], [], asked[7:]]))
    assert [it.tokens for it in asked] == [by_transformers(model, it) for it in asked]
    assert len(tapes) > 1
    assert any(tape.played for tape in tapes)
    assert [tape.closed for tape in tapes] == [True] * (len(tapes) - 1) + [False]
    batch.clear()
    assert tapes[-1].closed
