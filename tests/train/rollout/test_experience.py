"""Experience of rollouts: log-probabilities, values and scores do not see padding, and start where they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_rlhf.train.algorithms.logprobs import entropy, token_log_probs
from hpc_rlhf.train.algorithms.ppo import k3_kl, policy_loss_sum
from hpc_rlhf.train.data.tokenized import pad_left
from hpc_rlhf.train.models.load import RewardModel
from hpc_rlhf.train.rollout.engine import Sampling, decode
from hpc_rlhf.train.rollout.experience import (
    Experience,
    Rewarding,
    Rollout,
    answer_logits,
    answer_scores,
    answer_values,
    experience,
    whiten,
)
from hpc_rlhf.train.rollout.sampling import uniforms
from tests.train import tiny

PROMPTS = [[5, 9, 11, 30, 7], [8], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 4]]
ANSWERS = [[10, 20, tiny.EOS], [31, 32, 33, 34, 35, 36], [tiny.EOS], [50, 51, 52, 53, 54, tiny.EOS]]
REWARDING = Rewarding(
    temperature=0.8, kl_coef=0.1, score_clip=5.0, missing_eos_penalty=0.0, gamma=1.0, lam=0.95
)


@pytest.fixture(scope="module", params=tiny.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rollout_of(prompts: list[list[int]], answers: list[list[int]], pad_id: int = tiny.PAD) -> Rollout:
    width = max(map(len, answers))
    ids = torch.tensor([answer + [pad_id] * (width - len(answer)) for answer in answers])
    mask = torch.arange(width).unsqueeze(0) < torch.tensor([len(answer) for answer in answers]).unsqueeze(1)
    return Rollout.join(*pad_left(prompts, pad_id), ids, mask)


def sampled_rollout(model: Any, temperature: float) -> Rollout:
    ids, mask = pad_left(PROMPTS, tiny.PAD)
    drawn = uniforms([("row", i) for i in range(len(PROMPTS))], 8)
    made = decode(model, ids, mask, 8, Sampling(temperature), drawn, tiny.EOS, tiny.PAD)
    return Rollout.join(ids, mask, *made)


@torch.no_grad()
def test_padding_changes_no_log_probability_value_or_score(kind: str) -> None:
    actor, critic = tiny.causal(kind), RewardModel(tiny.classifier(kind, seed=1))
    together = rollout_of(PROMPTS, ANSWERS)
    log_probs = token_log_probs(answer_logits(actor, together), together.answers)
    values, scores = answer_values(critic, together), answer_scores(critic, together)
    assert log_probs.std() > 0.5
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = torch.tensor([prompt + answer])
        # Without a mask, position ids or padding: what the plain model says of this text alone.
        logits = actor(input_ids=ids).logits[:, len(prompt) - 1 : -1]
        alone = token_log_probs(logits, torch.tensor([answer]))[0]
        torch.testing.assert_close(log_probs[row, : len(answer)], alone, atol=2e-5, rtol=1e-5)
        body = critic.classifier.base_model(input_ids=ids).last_hidden_state
        plain = critic.classifier.score(body).squeeze(-1)[0]
        torch.testing.assert_close(
            values[row, : len(answer)], plain[len(prompt) - 1 : -1], atol=2e-5, rtol=1e-5
        )
        torch.testing.assert_close(scores[row], plain[-1], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_with_eos_changes_nothing(kind: str) -> None:
    actor, critic = tiny.causal(kind), RewardModel(tiny.classifier(kind, seed=1))
    usual, with_eos = rollout_of(PROMPTS, ANSWERS), rollout_of(PROMPTS, ANSWERS, pad_id=tiny.EOS)
    mask = usual.answer_mask
    a, b = (token_log_probs(answer_logits(actor, r), r.answers)[mask] for r in (usual, with_eos))
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        answer_scores(critic, usual), answer_scores(critic, with_eos), atol=2e-5, rtol=1e-5
    )


def test_against_itself_the_kl_is_exactly_zero_and_the_first_ratio_exactly_one(kind: str) -> None:
    actor, ref = tiny.causal(kind), tiny.causal(kind)
    value_model = RewardModel(tiny.classifier(kind, seed=1))
    rollout = sampled_rollout(actor, REWARDING.temperature)
    made = experience(rollout, actor, value_model, ref, value_model, REWARDING, tiny.EOS)
    assert torch.equal(made.log_probs, made.ref_log_probs)
    assert (k3_kl(made.log_probs, made.ref_log_probs, rollout.answer_mask) == 0).all()

    actor.train()  # as PPO's first minibatch does; dropout is 0
    now = token_log_probs(answer_logits(actor, rollout), rollout.answers, REWARDING.temperature)
    _, clipped, ratio = policy_loss_sum(now, made.log_probs, made.advantages, rollout.answer_mask, 0.2)
    assert now.requires_grad
    assert ratio.item() == rollout.answer_mask.sum().item()
    assert clipped.item() == 0


def test_log_probabilities_and_entropies_are_of_the_distribution_sampled_from() -> None:
    """The cached, step by step distributions of decoding and those of the one forward pass agree."""
    actor = tiny.causal("llama")
    value_model = RewardModel(tiny.classifier("llama", seed=1))
    rollout = sampled_rollout(actor, REWARDING.temperature)
    made = experience(rollout, actor, value_model, actor, value_model, REWARDING, tiny.EOS)
    row, prompt = 0, PROMPTS[0]
    text = list(prompt)
    for t in range(int(rollout.answer_mask[row].sum())):
        with torch.no_grad():
            logits = actor(input_ids=torch.tensor([text])).logits[:, -1:] / REWARDING.temperature
        token = int(rollout.answers[row, t])
        expected = logits[0, 0].log_softmax(0)[token]
        torch.testing.assert_close(made.log_probs[row, t], expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(made.entropies[row, t], entropy(logits)[0, 0], atol=2e-5, rtol=1e-5)
        text.append(token)


def test_eos_is_rewarded_and_an_answer_without_it_pays() -> None:
    model = RewardModel(tiny.classifier("llama", seed=1))
    actor = tiny.causal("llama")
    rollout = rollout_of(PROMPTS, ANSWERS)
    free = experience(rollout, actor, model, actor, model, REWARDING, tiny.EOS)
    fined = experience(
        rollout, actor, model, actor, model, Rewarding(0.8, 0.1, 50.0, 3.0, 1.0, 1.0), tiny.EOS
    )
    # With gamma = lambda = 1 and no KL the return is what the answer earned.
    earned = fined.returns[:, 0]
    expected = fined.scores - torch.tensor([0.0, 3.0, 0.0, 0.0])
    torch.testing.assert_close(earned, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(free.scores, fined.scores), "the score reported is the reward model's own"
    lasts = rollout.answer_mask.sum(dim=1) - 1
    assert (rollout.answers[torch.arange(4), lasts] == tiny.EOS).tolist() == [True, False, True, True]
    assert (fined.advantages[torch.arange(4), lasts] != 0).all(), "EOS takes part in learning"


def fake(advantages: list[list[float]], lengths: list[int]) -> Experience:
    tensor = torch.tensor(advantages)
    mask = torch.arange(tensor.shape[1]).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    zeros = torch.zeros_like(tensor)
    rollout = Rollout(zeros.long(), mask, mask)
    return Experience(rollout, zeros, zeros, zeros, zeros[:, 0], tensor, zeros, zeros)


def test_whitening_is_over_the_real_tokens_of_all_ranks() -> None:
    mine = [fake([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]], [2, 1]), fake([[-4.0, 6.0, 2.0]], [3])]
    others = [fake([[10.0, -3.0]], [2])]
    heard: list[dict[str, float]] = []
    whiten(others, lambda local: heard.append(local) or local)

    def sums(local: dict[str, float]) -> dict[str, float]:
        return {key: value + heard[0][key] for key, value in local.items()}

    whitened = whiten(mine, sums)
    everything = torch.tensor([1.0, 2.0, 3.0, -4.0, 6.0, 2.0, 10.0, -3.0])
    mean, spread = everything.mean(), everything.std(correction=0)
    for before, after in zip(mine, whitened, strict=True):
        mask = before.rollout.answer_mask
        torch.testing.assert_close(after.advantages[mask], (before.advantages[mask] - mean) / spread)
        assert (after.advantages[~mask] == 0).all()


def test_whitening_equal_advantages_gives_zeros() -> None:
    made = whiten([fake([[0.5, 0.5], [0.5, 0.0]], [2, 1])], lambda local: local)
    assert (made[0].advantages == 0).all()
