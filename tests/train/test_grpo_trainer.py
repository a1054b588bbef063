"""GRPO's steps on tiny models in this process: the exact gradient, and what takes part."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, pstdev, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_rlhf.spec.stages import GrpoSpec
from hpc_rlhf.train.rewards.blend import Scores
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.stages.grpo.trainer import GrpoTrainer
from hpc_rlhf.train.stages.policy.minibatches import Sizes
from tests.train import tiny
from tests.train.ppo_trainers import Alone, LeftOut, Steps, language

LONGEST = 6
PROMPTS = [[5, 9, 11, 30, 7], [8], [40, 41, 42, 43], [3, 4]]
RESPONSES = [
    [[10, 20, tiny.EOS], [31, 32, 33, 34, 35, 36], [tiny.EOS]],
    [[50, 51, 52, 53, tiny.EOS], [60, tiny.EOS], [61, 62, 63, 64, 65, 66]],
    [[70, 71, tiny.EOS], [72, tiny.EOS], [73, 74, 75, tiny.EOS]],
    [[80, tiny.EOS], [81, 82, tiny.EOS], [83, tiny.EOS]],
]
ROLLOUT = Rollout.of([p for p in PROMPTS for _ in range(3)], [r for group in RESPONSES for r in group])
# The fifth failed, no reward applies to the seventh, and the last group has no differences.
SCORES: list[float | None] = [1.0, 0.5, -2.0, 3.0, None, 0.25, None, 1.0, 0.5, 0.25, 0.25, 0.25]
SCORED = Scores(SCORES, {}, [row == 4 for row in range(12)])
REWARDS: list[dict[str, Any]] = [{"exact": "answer"}]


def trainer_of(world: Any = None, budget: int = 1000, **fields: Any) -> GrpoTrainer:
    models = SimpleNamespace(actor=language(), ref=language(5), policy=None, ema=None)
    models.actor.lr_scheduler = LeftOut()
    spec = GrpoSpec.model_validate({"group_size": 3, "rewards": REWARDS, **fields})
    sizes = Sizes(budget=budget, response=LONGEST, loss_factor=1.0)
    backend, rewards = SimpleNamespace(), SimpleNamespace()
    return GrpoTrainer(spec, models, backend, rewards, tiny.EOS, sizes, world or Alone())  # type: ignore[arg-type]


def log_probs_of(model: Any, row: int) -> Tensor:
    """The log-probabilities of a response's tokens, by the transformers model alone, without packing: (tokens,)."""
    prompt, response = ROLLOUT.prompts[row], ROLLOUT.responses[row]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    chosen: Tensor = logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    return chosen


def expected_advantages(spec: GrpoSpec, k1: list[list[float]]) -> list[list[float]]:
    """Each token's advantage, written out."""
    totals = list(SCORES)
    for row, score in enumerate(SCORES):
        if score is not None and spec.overlong == "penalty":
            over = len(ROLLOUT.responses[row]) - (LONGEST - 2)
            totals[row] = score - min(max(over, 0), 2) / 2
    in_reward = spec.kl_coef if spec.kl_in == "reward" else 0.0
    lengths = ROLLOUT.response_lengths
    if spec.advantage == "reinforce++":
        taking = [row for row in range(12) if totals[row] is not None and takes_part(spec, row)]
        returns = {row: [totals[row] - in_reward * sum(k1[row][t:]) for t in range(lengths[row])] for row in taking}  # type: ignore[operator]
        every = [value for row in taking for value in returns[row]]
        mean, spread = fmean(every), pstdev(every)
        return [[(value - mean) / spread for value in returns.get(row, [])] for row in range(12)]
    result = []
    for row, total in enumerate(totals):
        first = row - row % 3
        group = [r for r in range(first, first + 3) if totals[r] is not None]
        own = {r: totals[r] - in_reward * sum(k1[r]) for r in group}  # type: ignore[operator]
        if total is None or len(set(own.values())) == 1:
            result.append([0.0] * lengths[row])
            continue
        advantage = own[row] - fmean(own.values())
        if spec.advantage == "grpo":
            advantage /= stdev(own.values()) + 1e-4
        if spec.advantage == "rloo":
            advantage = own[row] - fmean(value for r, value in own.items() if r != row)
        result.append([advantage] * lengths[row])
    return result


def takes_part(spec: GrpoSpec, row: int) -> bool:
    cut = ROLLOUT.responses[row][-1] != tiny.EOS
    return SCORES[row] is not None and not (spec.overlong == "mask" and cut)


def expected_gradient(spec: GrpoSpec) -> Tensor:
    """The gradient of the loss as the papers write it, at the policy that sampled."""
    actor, ref = tiny.causal("llama", 0), tiny.causal("llama", 5)
    with torch.no_grad():
        refs = [log_probs_of(ref, row) for row in range(12)]
        k1 = [(log_probs_of(actor, row) - refs[row]).tolist() for row in range(12)]
    advantages = expected_advantages(spec, k1)
    rows = [row for row in range(12) if takes_part(spec, row)]
    losses = []
    for row in rows:
        log_probs = log_probs_of(actor, row)
        ratio = (log_probs - log_probs.detach()).exp()
        tokens = -ratio * torch.tensor(advantages[row])
        if spec.kl_in == "loss":
            log_ratio = refs[row] - log_probs
            tokens = tokens + spec.kl_coef * (log_ratio.exp() - log_ratio - 1)
        losses.append(tokens)
    if spec.loss_normalization == "token":
        loss = torch.cat(losses).mean()
    elif spec.loss_normalization == "sequence":
        loss = torch.stack([tokens.mean() for tokens in losses]).mean()
    else:
        loss = torch.stack([tokens.sum() / LONGEST for tokens in losses]).mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in actor.parameters()])


VARIANTS: dict[str, dict[str, Any]] = {
    "GRPO": {"loss_normalization": "sequence", "kl_coef": 0.04},
    "DAPO": {"cliprange_high": 0.28, "overlong": "penalty", "overlong_margin": 2},
    "Dr. GRPO": {"advantage": "dr_grpo", "loss_normalization": "constant", "overlong": "mask"},
    "RLOO": {"advantage": "rloo", "kl_coef": 0.1, "kl_in": "reward", "loss_normalization": "constant"},
    "REINFORCE++": {"advantage": "reinforce++", "kl_coef": 0.1, "kl_in": "reward", "overlong": "mask"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_the_papers_loss(steps: Callable[[float], Steps], variant: str) -> None:
    optimizer = steps(0.0)
    trainer = trainer_of(**VARIANTS[variant])
    trainer.learn(trainer.evaluate_scored(ROLLOUT, SCORED))
    (gradient,) = optimizer.gradients
    torch.testing.assert_close(gradient, expected_gradient(trainer.spec), atol=1e-5, rtol=1e-4)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("variant", ["GRPO", "REINFORCE++"])
def test_the_gradient_is_the_same_in_any_micro_batches_and_on_any_ranks(
    steps: Callable[[float], Steps], variant: str
) -> None:
    fields = VARIANTS[variant]
    whole = expected_gradient(trainer_of(**fields).spec)
    for budget in (1, 20):
        optimizer = steps(0.0)
        trainer = trainer_of(budget=budget, **fields)
        trainer.learn(trainer.evaluate_scored(ROLLOUT, SCORED))
        torch.testing.assert_close(optimizer.gradients[0], whole, atol=1e-5, rtol=1e-4)
    total = torch.zeros_like(whole)
    halves = [slice(0, 6), slice(6, 12)]
    for rank, own in enumerate(halves):
        optimizer, world = steps(0.0), Meeting.of(2, rank, halves, fields)
        trainer = trainer_of(world, **fields)
        trainer.learn(trainer.evaluate_scored(part(own), part_of_scores(own)))
        total += optimizer.gradients[0]
    torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-4)


def part(own: slice) -> Rollout:
    return Rollout.of(ROLLOUT.prompts[own], ROLLOUT.responses[own])


def part_of_scores(own: slice) -> Scores:
    return Scores(SCORES[own], {}, SCORED.failed[own])


class Meeting(Alone):
    """A world of one rank with what the other rank contributes, recorded in a rehearsal."""

    @classmethod
    def of(cls, ranks: int, rank: int, shares: list[slice], fields: dict[str, Any]) -> Meeting:
        rehearsal = Recorder()
        trainer = trainer_of(rehearsal, **fields)
        experience = trainer.evaluate_scored(part(shares[1 - rank]), part_of_scores(shares[1 - rank]))
        lengths = experience.mask.sum(dim=1)
        others = {"tokens": float(lengths.sum()), "responses": float((lengths > 0).sum())}
        return cls(others, rehearsal.gathered)


class Recorder(Alone):
    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[Any] = []

    def gather_data(self, thing: Any) -> list[Any]:
        self.gathered = [thing]
        return [thing]


def test_without_updates_the_ratio_is_exactly_one_over_what_takes_part(steps: Callable[[float], Steps]) -> None:
    optimizer = steps(0.0)
    trainer = trainer_of(budget=16, minibatches=2, num_iterations=2, temperature=0.7, overlong="mask", kl_coef=0.1)
    experience = trainer.evaluate_scored(ROLLOUT, SCORED)
    stats = trainer.learn(experience)
    rows = [row for row in range(12) if takes_part(trainer.spec, row)]
    tokens = sum(ROLLOUT.response_lengths[row] for row in rows)
    assert experience.mask.sum() == tokens
    assert stats["tokens"] == 2 * tokens
    assert stats["responses"] == 2 * len(rows)
    assert stats["ratio"] == pytest.approx(2 * tokens, abs=1e-3)
    assert optimizer.count == 4
    once = trainer_of(budget=16, minibatches=2, temperature=0.7)
    first = once.learn(once.evaluate_scored(ROLLOUT, SCORED))
    assert (first["ratio"], first["approx_kl"], first["clipped"]) == (first["tokens"], 0.0, 0.0)


@pytest.mark.parametrize("fields", [{}, {"kl_coef": 0.1, "overlong": "mask", "temperature": 0.7}])
def test_a_single_update_computes_the_log_probabilities_itself(
    steps: Callable[[float], Steps], fields: dict[str, Any]
) -> None:
    """With the same gradient, statistics and experience, to the last bit, as if they were computed before it."""
    results = []
    for learned_next in (False, True):
        optimizer, trainer, passes = steps(1e-3), trainer_of(budget=16, **fields), []
        trainer.models.ref = trainer.models.ref if trainer.spec.kl_coef else None
        trainer.models.actor.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        experience = trainer.evaluate_scored(ROLLOUT, SCORED, learned_next)
        evaluated = len(passes)
        stats = trainer.learn(experience)
        columns = (experience.log_probs, experience.ref_log_probs, experience.entropies, optimizer.gradients[0])
        results.append((evaluated, len(passes) - evaluated, stats, columns))
        assert trainer.learn(experience)["approx_kl"] > 0  # the experience stays that of the actor that sampled
    (before, update, stats, columns), (none, again, same, filled) = results
    assert (none, again) == (0, before) == (0, update)
    assert same == stats
    assert all(torch.equal(one, other) for one, other in zip(filled, columns, strict=True))


def test_log_probabilities_that_are_needed_before_the_update_are_computed_before_it() -> None:
    for fields in (
        {"num_iterations": 2}, {"minibatches": 2}, {"kl_coef": 0.1, "kl_in": "reward"}, {"advantage": "reinforce++"},
        {"dropout": 0.1}, {"rollout": {"engine": "vllm"}},
    ):  # fmt: skip
        experience = trainer_of(**fields).evaluate_scored(ROLLOUT, SCORED, learned_next=True)
        assert not experience.log_probs.isnan().any()


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "dr_grpo"])
def test_groups_without_differences_give_no_gradient(steps: Callable[[float], Steps], advantage: str) -> None:
    optimizer = steps(0.0)
    trainer = trainer_of(advantage=advantage)
    nothing: list[float | None] = [0.1] * 9 + [None, 0.7, None]
    trainer.learn(trainer.evaluate_scored(ROLLOUT, Scores(nothing, {}, [False] * 12)))
    assert (optimizer.gradients[0] == 0).all()


def test_a_rollout_of_which_nothing_takes_part_changes_nothing(steps: Callable[[float], Steps]) -> None:
    optimizer = steps(0.0)
    trainer = trainer_of(kl_coef=0.1, minibatches=2, stop_kl=0.1)
    stats = trainer.learn(trainer.evaluate_scored(ROLLOUT, Scores([None] * 12, {}, [True] * 12)))
    assert all((gradient == 0).all() for gradient in optimizer.gradients)
    assert stats["tokens"] == 0
    assert all(math.isfinite(value) for value in stats.values())


def test_the_loss_is_corrected_for_another_sampler(steps: Callable[[float], Steps]) -> None:
    fields: dict[str, Any] = {"kl_coef": 0.0, "rollout": {"importance_cap": 1.5}}
    plain = trainer_of(**fields)
    experience = plain.evaluate_scored(ROLLOUT, SCORED)
    assert plain.mismatch == {}
    shift = torch.randn(experience.log_probs.shape) * 0.5
    shifted = [
        (experience.log_probs + shift)[row, :length].tolist() for row, length in enumerate(ROLLOUT.response_lengths)
    ]
    other = Rollout.of(ROLLOUT.prompts, ROLLOUT.responses, log_probs=shifted)
    corrected = (trainer := trainer_of(**fields)).evaluate_scored(other, SCORED)
    weights = (-shift).exp()
    torch.testing.assert_close(corrected.advantages, experience.advantages * weights.clamp(max=1.5))
    mask = experience.mask
    assert trainer.mismatch["importance_clipfrac"] == pytest.approx((weights > 1.5)[mask].float().mean().item())
    each = (weights - 1 + shift)[mask]
    assert trainer.mismatch["sampler_kl"] == pytest.approx(each.mean().item(), rel=1e-3)
    assert trainer.mismatch["sampler_kl_max"] == pytest.approx(each.max().item(), rel=1e-3)
