"""The metrics of a PPO step, compared with a direct calculation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.experience import Experience
from hpc_rlhf.train.stages.ppo.metrics import STATS, summarize
from tests.train.ppo_trainers import Alone

EOS = 2
FOURS = dict.fromkeys((*STATS, "skipped", "actor_grad_norm", "critic_grad_norm"), 4.0)


def two_responses() -> Experience:
    """Responses of 3 tokens with EOS and of 2 without; what is outside the mask must not count."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rollout = Rollout.of([[9], [9]], [[5, 6, EOS], [7, 8]])
    nan = float("nan")
    return Experience(
        rollout=rollout,
        mask=mask,
        log_probs=torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, nan]]),
        ref_log_probs=torch.tensor([[-1.0, -1.0, -0.5], [-1.0, -1.0, nan]]),
        values=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, nan]]),
        scores=torch.tensor([3.0, -1.0]),
        score_clipped=torch.tensor([1.0, 0.0]),
        value_scale=torch.tensor([0.0, 1.0]),
        advantages=torch.zeros(2, 3),
        returns=torch.tensor([[1.0, 2.0, 4.0], [4.0, 9.0, nan]]),
        entropies=torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.0, nan]]),
    )


def test_every_number_is_over_real_tokens_and_all_responses() -> None:
    sums = (10.0, 20.0, 9.0, 0.5, 1.0, 2.0, 10.0, 36.0, 12.0)
    stats = {**dict(zip(STATS, sums, strict=True)), "skipped": 1.0, "actor_grad_norm": 0.5, "critic_grad_norm": 7.0}
    got = summarize(two_responses(), stats, PpoSpec(ptx_coef=2.0), EOS, Alone())
    returns = torch.tensor([1.0, 2.0, 4.0, 4.0, 9.0])
    errors = torch.tensor([0.0, 0.0, 1.0, 0.0, 4.0])
    assert got == pytest.approx(
        {
            "reward": 1.0,
            "reward_std": 2.0,
            "score_clipfrac": 0.5,
            "kl": (torch.e - 1 - 1) / 2,  # one token's log-ratio is 1: e - 1 - 1
            "entropy": 3.5 / 5,
            "ratio": 0.9,
            "approx_kl": 0.05,
            "clipfrac": 0.1,
            "value_clipfrac": 0.2,
            "passes": 2.0,
            "eos_rate": 0.5,
            "answer_tokens": 2.5,
            "actor_loss": 1.0,
            "critic_loss": 2.0,
            "actor_grad_norm": 0.5,
            "critic_grad_norm": 7.0,
            "ptx_loss": 3.0,
            "ptx_share": 6 / 7,
            "skipped": 1.0,
            "explained_variance": 1 - (errors.var(correction=0) / returns.var(correction=0)).item(),
        }
    )


class Twice(Alone):
    """Two ranks with the same numbers."""

    def sums(self, numbers: dict[str, float]) -> dict[str, float]:
        return {name: 2 * value for name, value in numbers.items()}

    def gather_data(self, thing: Any) -> list[Any]:
        return [thing, thing]


def test_two_ranks_with_the_same_responses_log_what_one_logs() -> None:
    once = summarize(two_responses(), FOURS, PpoSpec(), EOS, Alone())
    assert summarize(two_responses(), FOURS, PpoSpec(), EOS, Twice()) == pytest.approx(once)


def test_the_spread_of_rewards_survives_a_large_mean() -> None:
    """The mean of squares minus the squared mean would lose it."""
    experience = replace(two_responses(), scores=torch.tensor([16777216.0, 16777218.0]))
    for ranks in (Alone(), Twice()):
        assert summarize(experience, FOURS, PpoSpec(), EOS, ranks)["reward_std"] == 1.0


def test_responses_without_a_score_are_left_out_of_the_reward() -> None:
    nan = torch.nan
    experience = replace(two_responses(), scores=torch.tensor([nan, 3.0]), score_clipped=torch.tensor([nan, 1.0]))
    values = summarize(experience, FOURS, PpoSpec(), EOS, Alone())
    assert (values["reward"], values["score_clipfrac"]) == (3.0, 1.0)
    unscored = replace(experience, score_clipped=torch.tensor([nan, nan]))
    assert summarize(unscored, FOURS, PpoSpec(), EOS, Alone())["score_clipfrac"] is None


@pytest.mark.parametrize(
    ("fields", "known"), [({}, True), ({"temperature": 0.7}, True), ({"top_p": 0.9}, False), ({"top_k": 50}, False)]
)
def test_there_is_no_kl_of_responses_drawn_from_a_part_of_the_distribution(fields: dict[str, Any], known: bool) -> None:
    """It would be that of the whole distribution on samples of another: the truncated one's KL is higher."""
    assert (summarize(two_responses(), FOURS, PpoSpec(**fields), EOS, Alone())["kl"] is not None) == known


def test_without_a_mixture_there_are_no_metrics_of_it() -> None:
    values = summarize(two_responses(), {**FOURS, "ptx_tokens": 0.0}, PpoSpec(), EOS, Alone())
    assert not {"ptx_loss", "ptx_share"} & values.keys()
