"""PPO's steps on tiny models in this process: what learning sees, when it stops, and what goes on to the next rollout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models import packed
from hpc_rlhf.train.models.language import LanguageModel
from hpc_rlhf.train.models.load import RewardModel
from hpc_rlhf.train.rollout.experience import Rollout
from hpc_rlhf.train.stages.ppo_trainer import PpoTrainer, Sizes
from tests.train import tiny

PROMPTS = [[5, 9, 11, 30, 7], [8], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 4], [6, 6], [90, 12, 13]]
ANSWERS = [
    [10, 20, tiny.EOS], [31, 32, 33, 34, 35, 36], [tiny.EOS], [50, 51, 52, 53, 54, tiny.EOS],
    [60, tiny.EOS], [61, 62, 63, 64],
]  # fmt: skip
ROLLOUT = Rollout(PROMPTS, ANSWERS)
TOKENS = sum(map(len, ANSWERS))


class Alone(SimpleNamespace):
    """A world of one rank, or of more that a test speaks for.

    Attributes:
        others: added to every number summed over the ranks, by its name.
        parts: what the other ranks give to a gather.
    """

    def __init__(self, others: dict[str, float] | None = None, parts: list[Any] | None = None) -> None:
        super().__init__(device=torch.device("cpu"), others=others or {}, parts=parts or [])

    def sums(self, numbers: dict[str, float]) -> dict[str, float]:
        return {name: value + self.others.get(name, 0.0) for name, value in numbers.items()}

    def gather(self, thing: Any) -> list[Any]:
        return [thing, *self.parts]

    def max(self, number: int) -> int:
        return number


def language(seed: int = 0) -> LanguageModel:
    model = tiny.causal("llama", seed)
    packed.enable(model)
    return LanguageModel(model)


def rewarding(seed: int = 1) -> RewardModel:
    model = tiny.classifier("llama", seed)
    packed.enable(model)
    return RewardModel(model)


def trainer_of(world: Any = None, budget: int = 1000, ref_seed: int = 0, **fields: Any) -> PpoTrainer:
    models = SimpleNamespace(
        actor=language(), critic=rewarding(), ref=language(ref_seed), reward=rewarding(), ema=None
    )
    tokenizer = SimpleNamespace(eos_token_id=tiny.EOS)
    sizes = Sizes(budget=budget, answer=8, rows=4, loss_scale=1.0)
    return PpoTrainer(PpoSpec(**fields), models, tokenizer, sizes, world or Alone())  # type: ignore[arg-type]


class Steps:
    """Optimizer steps by plain Adam, in the place of DeepSpeed's."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.count = 0
        self.gradients: list[Tensor] = []
        self._adams: dict[int, torch.optim.Adam] = {}

    def __call__(self, model: Any, losses: list[Callable[[], Tensor]]) -> float:
        adam = self._adams.setdefault(id(model), torch.optim.Adam(model.parameters(), self.lr, (0.9, 0.95)))
        adam.zero_grad()
        for loss in losses:
            loss().backward()
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        adam.step()
        self.count += 1
        return 0.0


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Steps]]:
    def put(lr: float) -> Steps:
        made = Steps(lr)
        monkeypatch.setattr(engines, "optimizer_step", made)
        return made

    return put


def test_while_nothing_is_learnt_the_actor_is_exactly_the_one_that_sampled(
    steps: Callable[[float], Steps],
) -> None:
    """Evaluating and learning see the same micro-batches without dropout: the ratio is 1 to the last bit."""
    steps(0.0)
    trainer = trainer_of(budget=30, ppo_epochs=3, minibatches=2)
    learnt = trainer.learn(trainer.evaluate(ROLLOUT))
    assert learnt["tokens"] == 3 * TOKENS
    assert learnt["ratio"] == 3 * TOKENS
    assert (learnt["approx_kl"], learnt["clipped"]) == (0.0, 0.0)


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
