"""Generating answers: what transformers would say, ended at the first EOS, whatever batch a prompt stands in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train.data.tokenized import pad_left
from hpc_rlhf.train.rollout.engine import RolloutDropped, RolloutEngine, Sampling, decode, decode_steps
from hpc_rlhf.train.rollout.sampling import uniforms
from hpc_rlhf.train.world import World
from tests.train import tiny

NO_EOS = tiny.VOCABULARY  # a token that is never drawn
LENGTHS = (7, 1, 12, 4)
LIMIT = 14


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.causal(request.param, tie_word_embeddings=False)  # tied ones soon repeat themselves


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def greedy(
    model: Any, rows: list[list[int]], eos_id: int = NO_EOS, limit: int = LIMIT
) -> tuple[Tensor, Tensor]:
    return decode(model, *pad_left(rows, tiny.PAD), limit, Sampling(greedy=True), None, eos_id, tiny.PAD)


def sampled(
    model: Any, rows: list[list[int]], names: list[int], eos_id: int = NO_EOS
) -> tuple[Tensor, Tensor]:
    drawn = uniforms([("prompt", name) for name in names], LIMIT)
    return decode(model, *pad_left(rows, tiny.PAD), LIMIT, Sampling(1.0, 0.95, 40), drawn, eos_id, tiny.PAD)


def test_greedy_answers_are_those_of_transformers_token_for_token(model: Any) -> None:
    for seed in range(3):
        ids, mask = pad_left(prompts(seed), tiny.PAD)
        expected = model.generate(
            ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=LIMIT, eos_token_id=None,
            pad_token_id=tiny.PAD,
        )[:, ids.shape[1] :]  # fmt: skip
        answers, real = greedy(model, prompts(seed))
        assert answers.tolist() == expected.tolist()
        assert real.all()
        assert len(expected.unique()) > 8, "a model that always says the same proves nothing"


def test_a_prompt_gets_the_same_answer_in_any_batch(model: Any) -> None:
    rows = prompts()
    together, _ = sampled(model, rows, [0, 1, 2, 3])
    turned, _ = sampled(model, rows[::-1], [3, 2, 1, 0])
    assert turned.flip(0).tolist() == together.tolist()
    for i, row in enumerate(rows):
        alone, _ = sampled(model, [row], [i])
        assert alone.tolist() == together[i : i + 1].tolist()
    other, _ = sampled(model, rows, [4, 5, 6, 7])
    assert all(other[i].tolist() != together[i].tolist() for i in range(len(rows)))


def test_an_answer_ends_with_its_first_eos_and_pads_follow(model: Any) -> None:
    rows = prompts()
    free, _ = sampled(model, rows, [0, 1, 2, 3])
    ends = set()
    for eos_id in free[:, 2:9].flatten().unique()[::3].tolist():
        answers, real = sampled(model, rows, [0, 1, 2, 3], eos_id)
        assert real.dtype == torch.bool
        longest = 0
        for row, drawn in enumerate(free.tolist()):
            length = drawn.index(eos_id) + 1 if eos_id in drawn else LIMIT
            longest = max(longest, length)
            ends.add(length)
            width = answers.shape[1]
            assert answers[row, :length].tolist() == drawn[:length]
            assert real[row].tolist() == [True] * length + [False] * (width - length)
            assert (answers[row, length:] == tiny.PAD).all()
        assert answers.shape[1] == longest, "no step is made once all answers have ended"
    assert len(ends) > 3


def test_padding_with_eos_still_counts_eos_once(model: Any) -> None:
    rows = prompts()
    free, _ = sampled(model, rows, [0, 1, 2, 3])
    eos_id = free[0, 3].item()
    drawn = uniforms([("prompt", i) for i in range(4)], LIMIT)
    answers, real = decode(
        model, *pad_left(rows, eos_id), LIMIT, Sampling(1.0, 0.95, 40), drawn, eos_id, eos_id
    )
    other, other_real = sampled(model, rows, [0, 1, 2, 3], eos_id)
    assert torch.equal(real, other_real)
    assert torch.equal(answers[real], other[real])
    assert ((answers == eos_id) & real).sum(dim=1).max() == 1


def test_a_stop_drops_the_rollout_between_two_tokens() -> None:
    model, asked = tiny.causal("llama"), []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(RolloutDropped):
        decode(
            model, *pad_left(prompts(), tiny.PAD), LIMIT, Sampling(greedy=True), None, NO_EOS, tiny.PAD,
            stopped=stopped,
        )  # fmt: skip
    assert len(asked) == 3


def test_tokens_come_one_at_a_time() -> None:
    model = tiny.causal("llama")
    whole, _ = greedy(model, prompts())
    steps = decode_steps(
        model, *pad_left(prompts(), tiny.PAD), LIMIT, Sampling(greedy=True), None, NO_EOS, tiny.PAD
    )
    token, alive = next(steps)
    assert torch.equal(token, whole[:, 0])
    assert alive.all()
    assert torch.equal(next(steps)[0], whole[:, 1])


@pytest.mark.parametrize("was_training", [True, False])
def test_the_engine_generates_in_eval_mode_and_puts_the_mode_back(was_training: bool, world: World) -> None:
    model = tiny.causal("gpt2", resid_pdrop=0.5).train(was_training)
    expected, _ = greedy(tiny.causal("gpt2"), prompts())
    with RolloutEngine(model, world).ready() as ready:
        assert greedy(ready, prompts())[0].tolist() == expected.tolist()
    assert model.training is was_training


def test_the_engine_puts_the_mode_back_after_a_dropped_rollout(world: World) -> None:
    model = tiny.causal("gpt2").train()
    with pytest.raises(RolloutDropped), RolloutEngine(model, world).ready():
        raise RolloutDropped
    assert model.training
