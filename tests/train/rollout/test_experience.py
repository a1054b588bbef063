"""Experience of rollouts: right of each token whatever it is batched with, and right at the ends of answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpc_rlhf.train.algorithms.logprobs import entropy
from hpc_rlhf.train.algorithms.ppo import k3_kl, policy_loss_sum
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import RewardModel
from hpc_rlhf.train.rollout.experience import Experience, Rewarding, Rollout, experience, whiten
from tests.train import tiny

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 11, 30, 7], [8], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 4]]
ANSWERS = [[10, 20, tiny.EOS], [31, 32, 33, 34, 35, 36], [tiny.EOS], [50, 51, 52, 53, 54, tiny.EOS]]
ROLLOUT = Rollout(PROMPTS, ANSWERS)
REWARDING = Rewarding(
    temperature=0.8, kl_coef=0.1, score_clip=5.0, missing_eos_penalty=0.0, gamma=1.0, lam=0.95
)
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=tiny.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def actor_of(kind: str) -> LanguageModel:
    model = tiny.causal(kind)
    packed_attention.enable(model)
    return LanguageModel(model)


def critic_of(kind: str) -> RewardModel:
    model = tiny.classifier(kind, seed=1)
    packed_attention.enable(model)
    return RewardModel(model)


def made_of(kind: str, plan: list[list[int]], rewarding: Rewarding = REWARDING) -> Experience:
    actor, critic = actor_of(kind), critic_of(kind)
    return experience(ROLLOUT, plan, actor, critic, actor_of(kind), critic, rewarding, tiny.EOS, CPU)


@torch.no_grad()
def test_each_answer_has_the_numbers_that_it_has_alone(kind: str) -> None:
    made = made_of(kind, [[2, 0], [], [1, 3]])
    actor, classifier = tiny.causal(kind), tiny.classifier(kind, seed=1)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = torch.tensor([prompt + answer])
        logits = actor(input_ids=ids).logits[0, len(prompt) - 1 : -1] / REWARDING.temperature
        log_probs = logits.log_softmax(dim=-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        plain = classifier.score(classifier.base_model(input_ids=ids).last_hidden_state).squeeze(-1)[0]
        real = slice(len(answer))
        torch.testing.assert_close(made.log_probs[row, real], log_probs, **CLOSE)
        torch.testing.assert_close(made.entropies[row, real], entropy(logits), **CLOSE)
        torch.testing.assert_close(made.values[row, real], plain[len(prompt) - 1 : -1], **CLOSE)
        torch.testing.assert_close(made.scores[row], plain[-1], **CLOSE)
        assert made.mask[row].tolist() == [t < len(answer) for t in range(made.mask.shape[1])]
    assert made.log_probs[made.mask].std() > 0.5


@pytest.mark.parametrize("plan", [[[0, 1, 2, 3]], [[3], [1], [2], [0]]])
def test_it_is_the_same_in_any_micro_batches(plan: list[list[int]]) -> None:
    made, other = made_of("llama", [[2, 0], [1, 3], []]), made_of("llama", plan)
    for name in ("log_probs", "values", "scores", "advantages", "returns"):
        torch.testing.assert_close(getattr(made, name), getattr(other, name), **CLOSE)


def test_against_itself_the_kl_is_exactly_zero_and_the_first_ratio_exactly_one(kind: str) -> None:
    made = made_of(kind, [[2, 0, 1, 3]])
    assert torch.equal(made.log_probs, made.ref_log_probs)
    assert (k3_kl(made.log_probs, made.ref_log_probs, made.mask) == 0).all()

    actor = actor_of(kind).train()  # as PPO's first minibatch does; dropout is 0
    batch, answer = ROLLOUT.batch([2, 0, 1, 3], CPU)
    now, _ = actor(batch.ids, batch.lengths, answer, REWARDING.temperature)
    order = [2, 0, 1, 3]
    old = torch.cat([made.log_probs[row, : len(ANSWERS[row])] for row in order])
    mask = torch.ones(1, len(old), dtype=torch.bool)
    _, clipped, ratio = policy_loss_sum(now[None], old[None], torch.randn(1, len(old)), mask, 0.2)
    assert now.requires_grad
    assert ratio.item() == sum(map(len, ANSWERS))
    assert clipped.item() == 0


def test_eos_is_rewarded_and_an_answer_without_it_pays() -> None:
    free = made_of("llama", [[0, 1, 2, 3]])
    fined = made_of("llama", [[0, 1, 2, 3]], Rewarding(0.8, 0.1, 50.0, 3.0, 1.0, 1.0))
    # With gamma = lambda = 1 and no KL the return is what the answer earned.
    expected = fined.scores - torch.tensor([0.0, 3.0, 0.0, 0.0])
    torch.testing.assert_close(fined.returns[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(free.scores, fined.scores), "the score reported is the reward model's own"
    assert ROLLOUT.ended(tiny.EOS, CPU).tolist() == [True, False, True, True]
    lasts = fined.mask.sum(dim=1) - 1
    assert (fined.advantages[torch.arange(4), lasts] != 0).all(), "EOS takes part in learning"


def test_scores_are_brought_to_their_scale_before_the_penalty_and_the_clip() -> None:
    rewarding = replace(
        REWARDING, kl_coef=0.0, score_clip=2.0, missing_eos_penalty=0.25, lam=1.0,
        standardized=lambda scores: torch.tensor([1.0, 2.0, -7.0, 0.5]),
    )  # fmt: skip
    made = made_of("llama", [[0, 1, 2, 3]], rewarding)
    expected = torch.tensor([1.0, 1.75, -2.0, 0.5])  # the second one has no EOS
    torch.testing.assert_close(made.returns[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(made.scores, made_of("llama", [[0, 1, 2, 3]]).scores), (
        "the scores told are as they came"
    )


def test_whitened_rewards_have_variance_1_around_their_mean_over_all_ranks() -> None:
    heard: list[dict[str, float]] = []
    rewarding = replace(REWARDING, score_clip=50.0, lam=1.0, kl_coef=0.0)
    plain = made_of("llama", [[0, 1, 2, 3]], rewarding).returns[:, 0]  # without KL, what each answer earned
    made = made_of(
        "llama", [[0, 1, 2, 3]],
        replace(rewarding, reward_sums=lambda local: heard.append(local) or adding(OTHER_RANK)(local)),
    )  # fmt: skip
    tokens = sum(map(len, ANSWERS))
    each = torch.cat([plain, torch.zeros(tokens - len(plain)), torch.tensor([3.0, -1.0])]).double()
    mean, spread = each.mean(), each.std(correction=0)
    assert heard[0]["count"] == tokens
    for row, answer in enumerate(ANSWERS):
        earned = [0.0] * (len(answer) - 1) + [plain[row].item()]
        expected = sum((reward - mean) / spread + mean for reward in earned)
        torch.testing.assert_close(made.returns[row, 0].double(), expected, atol=1e-4, rtol=1e-4)


# What another rank adds up of its rewards, 3 and -1.
OTHER_RANK = {"count": 2.0, "sum": 2.0, "squares": 10.0}


def fake(advantages: list[list[float]], lengths: list[int]) -> Experience:
    tensor = torch.tensor(advantages)
    mask = torch.arange(tensor.shape[1]).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    zeros = torch.zeros_like(tensor)
    return Experience(Rollout([], []), mask, zeros, zeros, zeros, zeros[:, 0], tensor, zeros, zeros)


def adding(heard: dict[str, float]) -> Callable[[dict[str, float]], dict[str, float]]:
    return lambda local: {key: value + heard[key] for key, value in local.items()}


def test_whitening_is_over_the_real_tokens_of_all_ranks() -> None:
    mine = fake([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [-4.0, 6.0, 2.0]], [2, 1, 3])
    heard: list[dict[str, Any]] = []
    whiten(fake([[10.0, -3.0]], [2]), lambda local: heard.append(local) or local)
    after = whiten(mine, adding(heard[0]))
    everything = torch.tensor([1.0, 2.0, 3.0, -4.0, 6.0, 2.0, 10.0, -3.0])
    mean, spread = everything.mean(), everything.std(correction=0)
    torch.testing.assert_close(after.advantages[mine.mask], (mine.advantages[mine.mask] - mean) / spread)
    assert (after.advantages[~mine.mask] == 0).all()


def test_whitening_equal_advantages_gives_zeros() -> None:
    made = whiten(fake([[0.5, 0.5], [0.5, 0.0]], [2, 1]), lambda local: local)
    assert (made.advantages == 0).all()
