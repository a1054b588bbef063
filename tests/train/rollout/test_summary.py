"""The numbers logged of a PPO step, against a plain count."""

from __future__ import annotations

import pytest
import torch

from hpc_rlhf.train.rollout.experience import Experience, Rollout
from hpc_rlhf.train.stages.ppo.metrics import LEARNT, summarize

EOS = 2


def two_answers() -> Experience:
    """Answers of 3 tokens, ended, and of 2, cut off; whatever is behind a mask must not count."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rollout = Rollout([[9], [9]], [[5, 6, EOS], [7, 8]])
    nan = float("nan")
    return Experience(
        rollout=rollout,
        mask=mask,
        log_probs=torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, nan]]),
        ref_log_probs=torch.tensor([[-1.0, -1.0, -0.5], [-1.0, -1.0, nan]]),
        values=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, nan]]),
        scores=torch.tensor([3.0, -1.0]),
        advantages=torch.zeros(2, 3),
        returns=torch.tensor([[1.0, 2.0, 4.0], [4.0, 9.0, nan]]),
        entropies=torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.0, nan]]),
    )


def test_every_number_is_over_real_tokens_and_all_answers() -> None:
    learnt = dict(zip(LEARNT, (10.0, 20.0, 9.0, 0.5, 1.0, 2.0, 10.0), strict=True))
    got = summarize(two_answers(), learnt, EOS, lambda numbers: numbers)
    returns = torch.tensor([1.0, 2.0, 4.0, 4.0, 9.0])
    errors = torch.tensor([0.0, 0.0, 1.0, 0.0, 4.0])
    assert got == pytest.approx(
        {
            "reward": 1.0,
            "reward_std": 2.0,
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
            "explained_variance": 1 - (errors.var(correction=0) / returns.var(correction=0)).item(),
        }
    )


def test_it_is_the_same_however_the_answers_are_shared_out() -> None:
    """Two ranks with the same answers log what one rank logs."""
    learnt = dict.fromkeys(LEARNT, 4.0)
    once = summarize(two_answers(), learnt, EOS, lambda numbers: numbers)
    twice = summarize(two_answers(), learnt, EOS, lambda numbers: {k: 2 * v for k, v in numbers.items()})
    assert twice == pytest.approx(once)
