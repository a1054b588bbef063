"""PPO's steps on tiny models in this process: what is learned from, when it stops, and what carries over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.experience import Experience
from hpc_rlhf.train.stages.policy.progress import Progress
from tests.train.ppo_trainers import PROMPTS, RESPONSES, ROLLOUT, TOKENS, Alone, Steps, trainer_of


def test_without_updates_the_ratio_is_exactly_one(steps: Callable[[float], Steps]) -> None:
    """Evaluation and learning use the same micro-batches without dropout: the ratio is 1 to the last bit."""
    steps(0.0)
    trainer = trainer_of(budget=16, ppo_epochs=1, minibatches=2, temperature=0.7)
    seen: list[tuple[int, ...]] = []
    trainer.models.actor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    stats = trainer.learn(trainer.evaluate(ROLLOUT))
    assert stats["tokens"] == TOKENS
    assert stats["ratio"] == TOKENS
    assert (stats["approx_kl"], stats["clipped"]) == (0.0, 0.0)
    assert len(seen) > 4
    assert seen == seen[: len(seen) // 2] * 2


def test_every_epoch_learns_from_other_minibatches_of_all_rows(steps: Callable[[float], Steps]) -> None:
    steps(0.0)
    epochs: list[list[tuple[int, ...]]] = []
    for key in ((1, "a"), (1, "a"), (2, "a")):
        trainer = trainer_of(ppo_epochs=40, minibatches=3)
        seen: list[tuple[int, ...]] = []
        trainer.models.actor.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[1]))
        experience = trainer.evaluate(ROLLOUT)
        evaluated = len(seen)
        stats = trainer.learn(experience, key=key)
        assert stats["tokens"] == 40 * TOKENS
        assert stats["ratio"] == pytest.approx(40 * TOKENS, rel=1e-5)
        epochs.append(seen[evaluated:])
    assert epochs[0] == epochs[1] != epochs[2]
    whole = [epochs[0][first : first + 3] for first in range(0, 120, 3)]
    assert {tuple(sorted(length for batch in epoch for length in batch)) for epoch in whole} == {
        tuple(sorted(ROLLOUT.lengths))
    }
    assert len({tuple(map(tuple, map(sorted, epoch))) for epoch in whole}) > 10


@pytest.mark.parametrize("ppo_epochs", [1, 2])
def test_forward_passes_of_an_evaluation_are_reused_once(steps: Callable[[float], Steps], ppo_epochs: int) -> None:
    """They give the same bits as new passes, and are discarded once another rollout is learned from."""
    passes: list[int] = []
    seen: list[list[Tensor]] = []
    for fresh in (False, True):
        optimizer = steps(1e-3)
        trainer = trainer_of(ref_seed=5, ppo_epochs=ppo_epochs)
        for model in (trainer.models.actor, trainer.models.critic):
            model.register_forward_pre_hook(lambda *_: passes.append(1))
        for order in ((0,), (1, 0), (0, 1)):
            rollouts = [Rollout.of(PROMPTS, RESPONSES) for _ in order]
            evaluated = [trainer.evaluate(rollout) for rollout in rollouts]
            for one in order:
                if fresh:
                    evaluated[one] = replace(evaluated[one], rollout=Rollout.of(PROMPTS, RESPONSES))
                trainer.learn(evaluated[one])
        seen.append(optimizer.gradients)
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    # Saved: the actor's first pass when the rollout evaluated last is learned from first, which happens twice.
    assert len(passes) == 2 * 2 * (5 + 5 * ppo_epochs) - 2


def test_the_gradient_is_the_same_in_any_micro_batches(steps: Callable[[float], Steps]) -> None:
    seen = []
    for budget in (1, 20, 1000):
        optimizer = steps(0.0)
        trainer = trainer_of(budget=budget, ref_seed=5)
        trainer.learn(trainer.evaluate(ROLLOUT))
        seen.append(optimizer.gradients)
    for actor, critic in seen[1:]:
        torch.testing.assert_close(actor, seen[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(critic, seen[0][1], atol=1e-5, rtol=1e-4)
    assert seen[0][0].norm() > 1e-3


def test_the_loss_is_divided_by_the_tokens_of_all_ranks(steps: Callable[[float], Steps]) -> None:
    halves = []
    for others in (0.0, float(TOKENS)):
        optimizer = steps(0.0)
        trainer = trainer_of(whiten_advantages=False)
        experience = trainer.evaluate(ROLLOUT)
        trainer.world = Alone({"tokens": others})  # type: ignore[assignment]
        trainer.learn(experience)
        halves.append(optimizer.gradients[0])
    torch.testing.assert_close(halves[1] * 2, halves[0])


def test_several_epochs_of_minibatches_learn_and_stay_close(steps: Callable[[float], Steps]) -> None:
    optimizer = steps(1e-4)
    trainer = trainer_of(ppo_epochs=4, minibatches=3)
    experience = trainer.evaluate(ROLLOUT)
    stats = trainer.learn(experience)
    assert optimizer.count == 2 * 4 * 3
    assert all(math.isfinite(value) for value in stats.values())
    assert 0 < stats["approx_kl"] / stats["tokens"] < 0.1
    assert 0.8 < stats["ratio"] / stats["tokens"] < 1.2
    after = trainer.evaluate(ROLLOUT)
    # Tokens with an advantage are likelier now, and the critic is closer to the returns.
    gain = ((after.log_probs - experience.log_probs) * experience.advantages)[experience.mask].sum()
    assert gain > 0
    errors = [((e.values - experience.returns)[e.mask] ** 2).mean() for e in (experience, after)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("limit", "others", "expected"),
    [
        (None, {}, 12),
        (1e-9, {}, 2),  # the actor is unchanged in the first minibatch, but not in the second
        (1e9, {}, 12),
        (1.0, {"kl": 1e6}, 1),  # another rank exceeds the limit: this one stops with it
    ],
)
def test_steps_end_once_the_kl_exceeds_its_limit(
    steps: Callable[[float], Steps], limit: float | None, others: dict[str, float], expected: int
) -> None:
    optimizer = steps(1e-3)
    trainer = trainer_of(Alone(others), ppo_epochs=4, minibatches=3, stop_kl=limit)
    stats = trainer.learn(trainer.evaluate(ROLLOUT))
    assert optimizer.count == 2 * expected
    assert trainer.models.actor.lr_scheduler.steps == trainer.models.critic.lr_scheduler.steps == 12 - expected
    assert stats["tokens"] == sum(map(len, (RESPONSES * 4)[: 2 * expected]))


def test_the_kl_coefficient_carries_over_between_rollouts() -> None:
    trainer = trainer_of(
        Alone({"kl": 3.0, "responses": 6.0}), ref_seed=5, kl_target=1e-3, kl_horizon=60, lam=1.0, score_clip=1e-9
    )
    first = trainer.evaluate(ROLLOUT)
    assert trainer.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 12 / 60)), "12 responses over two ranks"
    second = trainer.evaluate(ROLLOUT)
    torch.testing.assert_close(second.returns, first.returns * 1.04, atol=1e-5, rtol=1e-4)
    fixed = trainer_of(ref_seed=5)
    fixed.evaluate(ROLLOUT)
    assert fixed.kl_coef == 0.1


def test_scores_are_standardized_by_all_so_far() -> None:
    theirs = torch.tensor([4.0, -2.0])
    trainer = trainer_of(
        Alone(parts=[astuple(Moments.of(theirs))]), normalize_scores=True, kl_coef=0.0, lam=1.0, score_clip=100.0
    )
    seen: list[Tensor] = []
    for _ in range(2):
        experience = trainer.evaluate(ROLLOUT)
        seen += [experience.scores, theirs]
        everything = torch.cat(seen).double()
        expected = (experience.scores - everything.mean()) / everything.std(correction=0)
        torch.testing.assert_close(experience.returns[:, 0], expected.float(), atol=1e-4, rtol=1e-4)
    again = trainer_of(normalize_scores=True)
    again.state = trainer.state
    assert again.state == trainer.state
    assert again.state != trainer_of().state


def critic_outputs(trainer: Any) -> Tensor:
    """The critic's outputs before each response token, as PPO pads them."""
    with torch.no_grad():
        batch, response = ROLLOUT.batch(range(len(ROLLOUT)), torch.device("cpu"))
        flat = trainer.models.critic(batch.ids, batch.lengths)[response - 1]
    return ragged.pad(flat, ROLLOUT.response_lengths)


@pytest.mark.parametrize(("shift", "spread"), [(6.0, 0.2), (-3.0, 40.0), (0.0, 1.0)])
def test_with_normalized_scores_the_critic_starts_on_their_scale(shift: float, spread: float) -> None:
    """Whatever the reward model's scale: the advantages are the same, because critic and scores are scaled alike."""
    seen = []
    for offset, scale in ((0.0, 1.0), (shift, spread)):
        trainer = trainer_of(normalize_scores=True, kl_coef=0.0, score_clip=100.0, whiten_advantages=False)
        for model in (trainer.models.critic, trainer.rewards.engine):  # type: ignore[attr-defined]
            inner = model.forward
            model.forward = lambda *inputs, inner=inner, b=offset, a=scale: inner(*inputs) * a + b
        experience = trainer.evaluate(ROLLOUT)
        scores = experience.scores.double()
        expected = (critic_outputs(trainer).double() - scores.mean()) / scores.std(correction=0)
        mask = experience.mask
        torch.testing.assert_close(experience.values[mask].double(), expected[mask], atol=1e-3, rtol=1e-3)
        seen.append(experience.advantages)
    torch.testing.assert_close(*seen, atol=2e-3, rtol=2e-3)


def test_the_critics_loss_is_on_the_scale_of_normalized_scores(steps: Callable[[float], Steps]) -> None:
    steps(0.0)
    trainer = trainer_of(normalize_scores=True, lam=1.0, kl_coef=0.0)
    experience = trainer.evaluate(ROLLOUT)
    trainer.evaluate(Rollout.of(PROMPTS[:3], RESPONSES[:3]))  # moves the running moments, not the experience's scale
    stats = trainer.learn(experience)
    errors = (experience.values - experience.returns)[experience.mask]
    assert stats["critic_loss"] == pytest.approx(0.5 * errors.square().sum().item(), rel=1e-4)
    assert stats["value_clipped"] == 0


def test_a_critic_that_learned_normalized_scores_is_not_scaled_again() -> None:
    """Runs that earlier versions began have one."""
    trainer = trainer_of(normalize_scores=True)
    old = {name: value for name, value in trainer.state.items() if name != "scales_values"}
    trainer.state = old
    experience = trainer.evaluate(ROLLOUT)
    assert experience.value_scale.tolist() == [0.0, 1.0]
    torch.testing.assert_close(experience.values, critic_outputs(trainer) * experience.mask, atol=1e-5, rtol=1e-5)


def test_gradient_norms_are_means_over_the_applied_steps(steps: Callable[[float], Steps]) -> None:
    optimizer = steps(1e-4)
    optimizer.skip = {2}
    trainer = trainer_of(minibatches=3)
    stats = trainer.learn(trainer.evaluate(ROLLOUT))
    norms = [float(gradient.norm()) for gradient in optimizer.gradients]
    assert stats["actor_grad_norm"] == pytest.approx((norms[0] + norms[4]) / 2)
    assert stats["critic_grad_norm"] == pytest.approx((norms[1] + norms[3] + norms[5]) / 3)


@pytest.mark.parametrize(
    ("skip", "updates"),
    [
        (set(), [2, 4, 6]),
        ({2}, [2, 6]),  # the actor's second step
        ({3}, [2, 4, 6]),  # the critic's
    ],
)
def test_a_skipped_step_is_counted_and_does_not_enter_the_moving_average(
    steps: Callable[[float], Steps], skip: set[int], updates: list[int]
) -> None:
    optimizer = steps(1e-4)
    optimizer.skip = skip
    trainer = trainer_of(ppo_epochs=1, minibatches=3)
    averaged: list[int] = []
    trainer.models.ema = SimpleNamespace(update=lambda: averaged.append(optimizer.count))  # type: ignore[assignment]
    stats = trainer.learn(trainer.evaluate(ROLLOUT))
    assert stats["skipped"] == len(skip)
    assert averaged == updates


def test_a_skipped_step_is_remembered_in_a_checkpoint(steps: Callable[[float], Steps], tmp_path: Path) -> None:
    """An attempt that resumes between an actor's skipped step and the critic's keeps the average."""
    steps(1e-4).skip = {0}
    trainer = trainer_of(minibatches=2)

    def save(progress: Progress[Experience]) -> None:
        if progress.done == 1:
            snapshot = Snapshot(tmp_path / "saved")
            progress.save(snapshot, rank=0)
            snapshot.write()

    trainer.learn(trainer.evaluate(ROLLOUT), before=save)
    progress = trainer.saved_progress(tmp_path / "saved", 1)
    assert (progress.skipped, progress.actor_skipped) == (1, True)
    assert progress.norms == {"actor": (0.0, 0), "critic": (0.0, 0)}
    assert progress.experience.rollout.prompts == PROMPTS
    assert progress.experience.rollout.responses == RESPONSES


def test_progress_that_an_earlier_version_saved_is_read(steps: Callable[[float], Steps], tmp_path: Path) -> None:
    steps(1e-4)
    trainer = trainer_of()
    snapshot = Snapshot(tmp_path / "saved")
    trainer.begin(trainer.evaluate(ROLLOUT)).save(snapshot, rank=0)
    snapshot.write()
    (path,) = (tmp_path / "saved").glob("*.safetensors")
    tensors = {name: t for name, t in load_file(path).items() if name not in ("norms", "value_scale", "score_clipped")}
    save_file({**tensors, "sums": torch.arange(7.0)}, path)
    progress = trainer.saved_progress(tmp_path / "saved", 0)
    assert [value.item() for value in progress.stats.values()] == [0, 1, 2, 3, 4, 5, 6, 0, 0]
    assert progress.experience.score_clipped.isnan().all()
    torch.testing.assert_close(trainer.learn(progress)["ratio"], 2.0 + TOKENS, atol=1e-3, rtol=0)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_each_minibatch_updates_the_actor_and_then_the_critic(
    steps: Callable[[float], Steps], minibatches: int
) -> None:
    optimizer = steps(0.0)
    trainer = trainer_of(ppo_epochs=2, minibatches=minibatches)
    trainer.learn(trainer.evaluate(ROLLOUT))
    sizes = [len(gradient) for gradient in optimizer.gradients]
    assert sizes == sizes[:2] * 2 * minibatches
    assert sizes[0] != sizes[1]
