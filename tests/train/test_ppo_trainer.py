"""PPO's steps on tiny models in this process: what learning sees, when it stops, and what goes on to the next rollout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.rollout.experience import Rollout
from tests.train.ppo_trainers import ANSWERS, PROMPTS, ROLLOUT, TOKENS, Alone, Steps, trainer_of


def test_while_nothing_is_learnt_the_actor_is_exactly_the_one_that_sampled(
    steps: Callable[[float], Steps],
) -> None:
    """Evaluating and learning see the same micro-batches without dropout: the ratio is 1 to the last bit."""
    steps(0.0)
    trainer = trainer_of(budget=16, ppo_epochs=3, minibatches=2, temperature=0.7)
    seen: list[tuple[int, ...]] = []
    trainer.models.actor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    learnt = trainer.learn(trainer.evaluate(ROLLOUT))
    assert learnt["tokens"] == 3 * TOKENS
    assert learnt["ratio"] == 3 * TOKENS
    assert (learnt["approx_kl"], learnt["clipped"]) == (0.0, 0.0)
    assert len(seen) > 8
    assert seen == seen[: len(seen) // 4] * 4


@pytest.mark.parametrize("ppo_epochs", [1, 2])
def test_the_passes_of_an_evaluation_are_learnt_from_once(
    steps: Callable[[float], Steps], ppo_epochs: int
) -> None:
    """They give the same bits as passes made anew, and those of a rollout are of no use once another was learnt from."""
    passes: list[int] = []
    seen: list[list[Tensor]] = []
    for fresh in (False, True):
        made = steps(1e-3)
        trainer = trainer_of(ref_seed=5, ppo_epochs=ppo_epochs)
        for model in (trainer.models.actor, trainer.models.critic):
            model.register_forward_pre_hook(lambda *_: passes.append(1))
        for order in ((0,), (1, 0), (0, 1)):
            rollouts = [Rollout(ROLLOUT.prompts, ROLLOUT.answers) for _ in order]
            evaluated = [trainer.evaluate(rollout) for rollout in rollouts]
            for one in order:
                if fresh:
                    evaluated[one] = replace(evaluated[one], rollout=Rollout(PROMPTS, ANSWERS))
                trainer.learn(evaluated[one])
        seen.append(made.gradients)
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    # Spared: both models' first passes where the rollout evaluated last is the first that is learnt from, twice.
    assert len(passes) == 2 * 2 * (5 + 5 * ppo_epochs) - 2 * 2


def test_the_gradient_is_the_same_in_any_micro_batches(steps: Callable[[float], Steps]) -> None:
    seen = []
    for budget in (1, 20, 1000):
        made = steps(0.0)
        trainer = trainer_of(budget=budget, ref_seed=5)
        trainer.learn(trainer.evaluate(ROLLOUT))
        seen.append(made.gradients)
    for actor, critic in seen[1:]:
        torch.testing.assert_close(actor, seen[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(critic, seen[0][1], atol=1e-5, rtol=1e-4)
    assert seen[0][0].norm() > 1e-3


def test_the_loss_is_divided_by_the_tokens_of_all_ranks(steps: Callable[[float], Steps]) -> None:
    halves = []
    for others in (0.0, float(TOKENS)):
        made = steps(0.0)
        trainer = trainer_of(whiten_advantages=False)
        experience = trainer.evaluate(ROLLOUT)
        trainer.world = Alone({"tokens": others})  # type: ignore[assignment]
        trainer.learn(experience)
        halves.append(made.gradients[0])
    torch.testing.assert_close(halves[1] * 2, halves[0])


def test_several_epochs_of_minibatches_learn_and_stay_near(steps: Callable[[float], Steps]) -> None:
    made = steps(1e-4)
    trainer = trainer_of(ppo_epochs=4, minibatches=3)
    experience = trainer.evaluate(ROLLOUT)
    learnt = trainer.learn(experience)
    assert made.count == 2 * 4 * 3
    assert all(math.isfinite(value) for value in learnt.values())
    assert 0 < learnt["approx_kl"] / learnt["tokens"] < 0.1
    assert 0.8 < learnt["ratio"] / learnt["tokens"] < 1.2
    after = trainer.evaluate(ROLLOUT)
    # What had an advantage is likelier now, and the critic is nearer to the returns it was taught.
    gain = ((after.log_probs - experience.log_probs) * experience.advantages)[experience.mask].sum()
    assert gain > 0
    errors = [((e.values - experience.returns)[e.mask] ** 2).mean() for e in (experience, after)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("limit", "others", "expected"),
    [
        (None, {}, 12),
        (1e-9, {}, 2),  # the first minibatch finds the actor where it sampled; the second does not
        (1e9, {}, 12),
        (1.0, {"kl": 1e6}, 1),  # another rank has gone too far: this one stops with it
    ],
)
def test_steps_are_left_out_once_the_actor_has_gone_too_far(
    steps: Callable[[float], Steps], limit: float | None, others: dict[str, float], expected: int
) -> None:
    made = steps(1e-3)
    trainer = trainer_of(Alone(others), ppo_epochs=4, minibatches=3, stop_kl=limit)
    learnt = trainer.learn(trainer.evaluate(ROLLOUT))
    assert made.count == 2 * expected
    assert learnt["tokens"] == sum(map(len, (ANSWERS * 4)[: 2 * expected]))


def test_the_kl_weight_is_steered_from_rollout_to_rollout() -> None:
    trainer = trainer_of(
        Alone({"kl": 3.0, "answers": 6.0}),
        ref_seed=5,
        kl_target=1e-3,
        kl_horizon=60,
        lam=1.0,
        score_clip=1e-9,
    )
    first = trainer.evaluate(ROLLOUT)
    assert trainer.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 12 / 60)), "12 answers over two ranks"
    second = trainer.evaluate(ROLLOUT)
    torch.testing.assert_close(second.returns, first.returns * 1.04, atol=1e-5, rtol=1e-4)
    fixed = trainer_of(ref_seed=5)
    fixed.evaluate(ROLLOUT)
    assert fixed.kl_coef == 0.1


def test_scores_are_counted_from_all_that_were_seen() -> None:
    theirs = torch.tensor([4.0, -2.0])
    trainer = trainer_of(
        Alone(parts=[Moments.of(theirs)]), normalize_scores=True, kl_coef=0.0, lam=1.0, score_clip=100.0
    )
    seen: list[Tensor] = []
    for _ in range(2):
        made = trainer.evaluate(ROLLOUT)
        seen += [made.scores, theirs]
        everything = torch.cat(seen).double()
        expected = (made.scores - everything.mean()) / everything.std(correction=0)
        torch.testing.assert_close(made.returns[:, 0], expected.float(), atol=1e-4, rtol=1e-4)
    again = trainer_of(normalize_scores=True)
    again.state = trainer.state
    assert again.state == trainer.state
    assert again.state != trainer_of().state
