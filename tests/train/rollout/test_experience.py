"""Experience: correct for each token whatever it is batched with, and at the ends of responses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpc_rlhf.train.algorithms.advantages import Gae
from hpc_rlhf.train.algorithms.logprobs import entropy
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.algorithms.ppo import k3_kl, policy_loss_sum
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.language_model import LanguageModel, RewardModel
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.experience import Experience, RewardShaping, evaluate_tokens, make_experience, whiten
from tests.train import tiny
from tests.train.ppo_trainers import Alone

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 11, 30, 7], [8], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 4]]
RESPONSES = [[10, 20, tiny.EOS], [31, 32, 33, 34, 35, 36], [tiny.EOS], [50, 51, 52, 53, 54, tiny.EOS]]
ROLLOUT = Rollout.of(PROMPTS, RESPONSES)
TEMPERATURE = 0.8
SHAPING = RewardShaping(kl_coef=0.1, score_clip=5.0, missing_eos_penalty=0.0)
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


def experience_of(kind: str, plan: list[list[int]], shaping: RewardShaping = SHAPING, lam: float = 0.95) -> Experience:
    critic = critic_of(kind)
    scores = ModelReward(critic, Alone(), 20).score(PROMPTS, RESPONSES, {})  # type: ignore[arg-type]
    stats = evaluate_tokens(ROLLOUT, plan, actor_of(kind), critic, actor_of(kind), TEMPERATURE, CPU)
    return make_experience(ROLLOUT, stats, torch.tensor(scores), shaping, Gae(1.0, lam), tiny.EOS)


@torch.no_grad()
def test_numbers_of_a_response_do_not_depend_on_the_batch(kind: str) -> None:
    experience = experience_of(kind, [[2, 0], [], [1, 3]])
    actor, classifier = tiny.causal(kind), tiny.classifier(kind, seed=1)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + answer])
        logits = actor(input_ids=ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        log_probs = logits.log_softmax(dim=-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        plain = classifier.score(classifier.base_model(input_ids=ids).last_hidden_state).squeeze(-1)[0]
        real = slice(len(answer))
        torch.testing.assert_close(experience.log_probs[row, real], log_probs, **CLOSE)
        torch.testing.assert_close(experience.entropies[row, real], entropy(logits), **CLOSE)
        torch.testing.assert_close(experience.values[row, real], plain[len(prompt) - 1 : -1], **CLOSE)
        torch.testing.assert_close(experience.scores[row], plain[-1], **CLOSE)
        assert experience.mask[row].tolist() == [t < len(answer) for t in range(experience.mask.shape[1])]
    assert experience.log_probs[experience.mask].std() > 0.5


@pytest.mark.parametrize("plan", [[[0, 1, 2, 3]], [[3], [1], [2], [0]]])
def test_experience_does_not_depend_on_micro_batches(plan: list[list[int]]) -> None:
    experience, other = experience_of("llama", [[2, 0], [1, 3], []]), experience_of("llama", plan)
    for name in ("log_probs", "values", "scores", "advantages", "returns"):
        torch.testing.assert_close(getattr(experience, name), getattr(other, name), **CLOSE)


def test_against_itself_the_kl_is_exactly_zero_and_the_first_ratio_exactly_one(kind: str) -> None:
    experience = experience_of(kind, [[2, 0, 1, 3]])
    assert torch.equal(experience.log_probs, experience.ref_log_probs)
    assert (k3_kl(experience.log_probs, experience.ref_log_probs, experience.mask) == 0).all()

    actor = actor_of(kind).train()  # as PPO's first minibatch does; dropout is 0
    batch, answer = ROLLOUT.batch([2, 0, 1, 3], CPU)
    now, _ = actor(batch.ids, batch.lengths, answer, TEMPERATURE)
    order = [2, 0, 1, 3]
    old = torch.cat([experience.log_probs[row, : len(RESPONSES[row])] for row in order])
    mask = torch.ones(1, len(old), dtype=torch.bool)
    _, clipped, ratio = policy_loss_sum(now[None], old[None], torch.randn(1, len(old)), mask, 0.2)
    assert now.requires_grad
    assert ratio.item() == sum(map(len, RESPONSES))
    assert clipped.item() == 0


def test_eos_is_rewarded_and_a_response_without_it_is_penalized() -> None:
    free = experience_of("llama", [[0, 1, 2, 3]])
    fined = experience_of("llama", [[0, 1, 2, 3]], RewardShaping(0.1, 50.0, 3.0), lam=1.0)
    # With gamma = lambda = 1 and no KL the return is what the response earned.
    expected = fined.scores - torch.tensor([0.0, 3.0, 0.0, 0.0])
    torch.testing.assert_close(fined.returns[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(free.scores, fined.scores), "the score reported is the reward model's own"
    assert ROLLOUT.ended(tiny.EOS, CPU).tolist() == [True, False, True, True]
    lasts = fined.mask.sum(dim=1) - 1
    assert (fined.advantages[torch.arange(4), lasts] != 0).all(), "EOS takes part in learning"


@pytest.mark.parametrize(("second", "earned"), [(1.0, 0.75), (2.0, 1.75), (-7.0, -2.25), (9.0, 1.75)])
def test_scores_are_standardized_then_clipped_then_penalized(second: float, earned: float) -> None:
    """The second response has no EOS. It is penalized however far its score is clipped."""
    shaping = RewardShaping(0.0, 2.0, 0.25, standardize=lambda scores: torch.tensor([1.0, second, -7.0, 0.5]))
    experience = experience_of("llama", [[0, 1, 2, 3]], shaping, lam=1.0)
    expected = torch.tensor([1.0, earned, -2.0, 0.5])
    torch.testing.assert_close(experience.returns[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert experience.score_clipped.tolist() == [0.0, float(abs(second) > 2), 1.0, 0.0]
    assert torch.equal(experience.scores, experience_of("llama", [[0, 1, 2, 3]]).scores), (
        "the reported scores are the source's own"
    )


def test_whitened_rewards_have_variance_1_around_their_mean_over_all_ranks() -> None:
    gathered: list[Moments] = []

    def gather(own: Moments) -> list[Moments]:
        gathered.append(own)
        return [own, Moments.of(torch.tensor([3.0, -1.0]))]  # the rewards of another rank

    shaping = RewardShaping(kl_coef=0.0, score_clip=50.0, missing_eos_penalty=0.0)
    plain = experience_of("llama", [[0, 1, 2, 3]], shaping, lam=1.0).returns[:, 0]  # what each response earned
    experience = experience_of("llama", [[0, 1, 2, 3]], replace(shaping, gather=gather), lam=1.0)
    tokens = sum(map(len, RESPONSES))
    each = torch.cat([plain, torch.zeros(tokens - len(plain)), torch.tensor([3.0, -1.0])]).double()
    mean, spread = each.mean(), each.std(correction=0)
    assert gathered[0].count == tokens
    for row, answer in enumerate(RESPONSES):
        earned = [0.0] * (len(answer) - 1) + [plain[row].item()]
        expected = sum((reward - mean) / spread + mean for reward in earned)
        torch.testing.assert_close(experience.returns[row, 0].double(), expected, atol=1e-4, rtol=1e-4)


def fake(advantages: list[list[float]], lengths: list[int]) -> Experience:
    tensor = torch.tensor(advantages)
    mask = torch.arange(tensor.shape[1]).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    zeros = torch.zeros_like(tensor)
    return Experience(
        mask, zeros, zeros, zeros, zeros, Rollout.of([], []), zeros[:, 0], tensor, zeros[:, 0],
        torch.tensor([0.0, 1.0]), zeros,
    )  # fmt: skip


def test_whitening_is_over_the_real_tokens_of_all_ranks() -> None:
    mine = fake([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [-4.0, 6.0, 2.0]], [2, 1, 3])
    others = Moments.of(torch.tensor([10.0, -3.0]))
    after = whiten(mine, lambda own: [own, others])
    everything = torch.tensor([1.0, 2.0, 3.0, -4.0, 6.0, 2.0, 10.0, -3.0])
    mean, spread = everything.mean(), everything.std(correction=0)
    torch.testing.assert_close(after.advantages[mine.mask], (mine.advantages[mine.mask] - mean) / spread)
    assert (after.advantages[~mine.mask] == 0).all()


def test_whitening_equal_advantages_gives_zeros() -> None:
    experience = whiten(fake([[0.5, 0.5], [0.5, 0.0]], [2, 1]), lambda own: [own])
    assert (experience.advantages == 0).all()
