"""What a right PPO passes, point for point, with the tests that fail where a line of it is broken.

1.  Padding is not EOS, and EOS is learnt like any answer token.
    models/test_tokenizers.py::test_padding_beginning_and_end_have_tokens_of_their_own
    test_ppo_points.py::test_an_answer_of_eos_alone_is_learnt_from
    rollout/test_experience.py::test_each_answer_has_the_numbers_that_it_has_alone
2.  What a sequence is batched with changes no log-probability; positions begin anew with each.
    models/test_language_model.py::test_a_token_has_the_log_probability_that_it_has_alone
    models/test_language_model.py::test_a_token_has_the_value_that_it_has_alone
    models/test_language_model.py::test_a_packed_model_still_takes_padded_rows
    rollout/in_process/test_engine.py::test_greedy_answers_are_those_of_transformers_token_for_token
3.  An answer ends at its first EOS before it is scored; one without EOS can be made to pay.
    rollout/in_process/test_engine.py::test_an_answer_ends_with_its_first_eos
    rollout/test_experience.py::test_eos_is_rewarded_and_an_answer_without_it_pays
4.  The score is that of the last real token, and is earned there.
    rollout/test_experience.py::test_each_answer_has_the_numbers_that_it_has_alone
    algorithms/test_ppo.py::test_the_reward_is_the_kl_penalty_at_each_token_and_the_clipped_score_at_the_last
5.  One temperature for sampling and for all log-probabilities.
    test_ppo_points.py::test_one_temperature_is_sampled_at_and_judged_at
    rollout/test_experience.py::test_each_answer_has_the_numbers_that_it_has_alone
    rollout/test_experience.py::test_against_itself_the_kl_is_exactly_zero_and_the_first_ratio_exactly_one
    test_ppo_trainer.py::test_while_nothing_is_learnt_the_actor_is_exactly_the_one_that_sampled
    rollout/in_process/test_engine.py::test_sampled_answers_have_the_distribution_of_the_model
6.  Without dropout the first ratio is 1, the KL from the actor that sampled 0, and nothing clipped.
    models/test_loading.py::test_a_model_that_was_saved_with_dropout_trains_without_it
    test_ppo_points.py::test_experience_is_made_without_dropout_and_learning_goes_on_with_it
    test_ppo_trainer.py::test_while_nothing_is_learnt_the_actor_is_exactly_the_one_that_sampled
    test_stages.py::test_the_first_ppo_step_starts_from_the_reference
7.  Softmax in float32; the first KL from the reference is exactly 0.
    algorithms/test_logprobs.py::test_bfloat16_logits_are_normalised_in_float32
    algorithms/test_logprobs.py::test_from_hidden_states_it_is_the_same_with_the_same_gradients
    test_ppo_points.py::test_a_bfloat16_head_is_normalised_in_float32
    rollout/test_experience.py::test_against_itself_the_kl_is_exactly_zero_and_the_first_ratio_exactly_one
8.  The reward pays for k1, the metric is k3; the weight may follow the KL.
    algorithms/test_ppo.py::test_the_reward_is_the_kl_penalty_at_each_token_and_the_clipped_score_at_the_last
    algorithms/test_ppo.py::test_k3_is_never_negative_and_its_mean_is_the_kl
    rollout/test_summary.py::test_every_number_is_over_real_tokens_and_all_answers
    algorithms/test_ppo.py::test_the_kl_weight_follows_the_relative_error_within_its_bounds
    test_ppo_trainer.py::test_the_kl_weight_is_steered_from_rollout_to_rollout
9.  Scores are normalised and rewards whitened only if asked for; advantages are whitened over all ranks' real tokens.
    test_ppo_points.py::test_unasked_no_reward_is_rescaled
    test_ppo_trainer.py::test_scores_are_counted_from_all_that_were_seen
    rollout/test_experience.py::test_whitened_rewards_have_variance_1_around_their_mean_over_all_ranks
    rollout/test_experience.py::test_whitening_is_over_the_real_tokens_of_all_ranks
10. The critic starts from the reward model.
    test_ppo_points.py::test_the_critic_starts_as_the_reward_model_and_the_reference_as_the_actor
11. Advantages are the sums of their definition.
    algorithms/test_ppo.py::test_advantages_equal_the_double_sum_on_ragged_lengths
12. The loss does not change with micro-batches, accumulation or ranks.
    test_ppo_trainer.py::test_the_gradient_is_the_same_in_any_micro_batches
    test_ppo_trainer.py::test_the_loss_is_divided_by_the_tokens_of_all_ranks
    test_agreement.py::test_curves_agree
13. Several epochs of minibatches stay stable.
    test_ppo_trainer.py::test_several_epochs_of_minibatches_learn_and_stay_near
    test_ppo_trainer.py::test_steps_are_left_out_once_the_actor_has_gone_too_far
14. The moving average is in float32, follows every optimizer step, and is in the checkpoint.
    models/test_ema.py::test_updates_of_less_than_a_hundredth_are_not_lost
    test_ppo_points.py::test_the_moving_average_follows_every_step
    test_ppo_points.py::test_the_moving_average_is_in_the_checkpoint
    test_stages.py::test_a_stopped_chain_ends_in_the_same_weights
15. KL, entropy, ratio, clip fractions, EOS rate, length and explained variance are logged.
    rollout/test_summary.py::test_every_number_is_over_real_tokens_and_all_answers
    test_stages.py::test_the_first_ppo_step_starts_from_the_reference
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.algorithms.logprobs import head_log_probs
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.loading import load_reward
from hpc_rlhf.train.rollout.experience import Rollout
from hpc_rlhf.train.rollout.in_process.sampling import Sampling
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.ppo.models import PpoModels, Start
from tests.train import tiny
from tests.train.ppo_trainers import ANSWERS, PROMPTS, ROLLOUT, Steps, trainer_of

HERE = Path(__file__).parent


def test_every_point_has_its_tests() -> None:
    assert __doc__ is not None
    points = re.split(r"^(\d+)\. ", __doc__, flags=re.MULTILINE)[1:]
    assert [int(number) for number in points[::2]] == list(range(1, 16))
    for text in points[1::2]:
        named = re.findall(r"(\S+\.py)::(\w+)", text)
        assert named
        for file, test in named:
            assert f"\ndef {test}(" in (HERE / file).read_text(), f"{file} has no {test}"


def test_an_answer_of_eos_alone_is_learnt_from(steps: Callable[[float], Steps]) -> None:
    made = steps(0.0)
    trainer = trainer_of(whiten_advantages=False)
    learnt = trainer.learn(trainer.evaluate(Rollout(PROMPTS[:2], [[tiny.EOS], [tiny.EOS]])))
    assert learnt["tokens"] == 2
    head = made.gradients[0]
    assert head.norm() > 1e-3


def test_one_temperature_is_sampled_at_and_judged_at(steps: Callable[[float], Steps]) -> None:
    steps(0.0)
    seen: list[Sampling] = []

    def generate(prompts: Any, keys: Any, longest: int, sampling: Sampling, *_: Any) -> list[list[int]]:
        seen.append(sampling)
        return ANSWERS

    trainer = trainer_of(temperature=0.6, top_p=0.9, top_k=7)
    trainer.models.rollouts = SimpleNamespace(generate=generate)  # type: ignore[assignment]
    made = trainer.evaluate(trainer.roll_out(PROMPTS, [], bool))
    assert seen == [Sampling(0.6, 0.9, 7)]
    ids = torch.tensor([PROMPTS[0] + ANSWERS[0]])
    with torch.no_grad():
        logits = tiny.causal("llama")(input_ids=ids).logits[0, len(PROMPTS[0]) - 1 : -1] / 0.6
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ANSWERS[0]).unsqueeze(1)).squeeze(1)
    for found in (made.log_probs, made.ref_log_probs):
        torch.testing.assert_close(found[0, : len(ANSWERS[0])], expected, atol=2e-5, rtol=1e-5)
    assert trainer.learn(made)["ratio"] == made.mask.sum().item()


def test_experience_is_made_without_dropout_and_learning_goes_on_with_it() -> None:
    trainer = trainer_of()
    for model in (trainer.models.actor.causal, trainer.models.critic.classifier):
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
    trainer.models.actor.train()
    trainer.models.critic.train()
    once, again = trainer.evaluate(ROLLOUT), trainer.evaluate(ROLLOUT)
    for name in ("log_probs", "values"):
        assert torch.equal(getattr(once, name), getattr(again, name))
    assert trainer.models.actor.training
    assert trainer.models.critic.training
    batch, answer = ROLLOUT.batch([0], torch.device("cpu"))
    noisy = [trainer.models.actor(batch.ids, batch.lengths, answer)[0] for _ in range(2)]
    assert not torch.equal(*noisy), "this model does have dropout"


def test_a_bfloat16_head_is_normalised_in_float32() -> None:
    # Logits that bfloat16 holds exactly, so that none are rounded before.
    hidden, weight = (torch.randint(-1, 2, (rows, 16)).bfloat16() for rows in (5, 1000))
    tokens = torch.arange(5)
    found, entropies = head_log_probs(hidden, weight, None, tokens, 1.0, True)
    logits = F.linear(hidden, weight).float().log_softmax(-1)
    torch.testing.assert_close(found, logits[torch.arange(5), tokens], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropies, -(logits.exp() * logits).sum(-1), atol=1e-4, rtol=1e-5)


def test_unasked_no_reward_is_rescaled() -> None:
    made = trainer_of(kl_coef=0.0, lam=1.0, score_clip=100.0).evaluate(ROLLOUT)
    torch.testing.assert_close(made.returns[:, 0], made.scores, atol=1e-5, rtol=1e-5)


@pytest.fixture
def models(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> PpoModels:
    """PPO's models from folders, without DeepSpeed around them."""
    tiny.causal("llama", seed=3).save_pretrained(tmp_path / "sft")
    tiny.classifier("llama", seed=4).save_pretrained(tmp_path / "reward")
    monkeypatch.setattr(engines, "training_engine", lambda model, *_: model)
    monkeypatch.setattr(engines, "save", lambda *_: None)
    monkeypatch.setattr(engines, "load", lambda *_: None)
    spec = PpoSpec(precision="fp32", ema=True, ema_beta=0.5)
    configs = {name: {"zero_optimization": {"stage": 0}} for name in spec.strategies}
    start = Start(str(tmp_path / "sft"), str(tmp_path / "reward"), configs, longest=32, updates=1, seed=1)
    return PpoModels(spec, start, range(tiny.VOCABULARY), world)


def test_the_critic_starts_as_the_reward_model_and_the_reference_as_the_actor(
    models: PpoModels, tmp_path: Path
) -> None:
    kept = load_reward(str(tmp_path / "reward"), torch.float32, None).state_dict()
    for model in (models.critic, models.reward):
        found = model.state_dict()
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert kept["classifier.score.weight"].abs().sum() > 0
    assert all(parameter.requires_grad for parameter in models.critic.parameters())
    assert not any(parameter.requires_grad for parameter in models.reward.parameters())
    actor, ref = models.policy.state_dict(), models.ref_policy.state_dict()
    assert all(torch.equal(actor[name], ref[name]) for name in actor)
    assert actor["lm_head.weight"].data_ptr() != ref["lm_head.weight"].data_ptr()


def test_the_moving_average_follows_every_step(steps: Callable[[float], Steps]) -> None:
    made = steps(1e-4)
    trainer = trainer_of(ppo_epochs=2, minibatches=3)
    updates: list[int] = []
    trainer.models.ema = SimpleNamespace(update=lambda: updates.append(made.count))  # type: ignore[assignment]
    trainer.learn(trainer.evaluate(ROLLOUT))
    assert updates == [2, 4, 6, 8, 10, 12], "after each step of actor and critic"


def test_the_moving_average_is_in_the_checkpoint(models: PpoModels, tmp_path: Path) -> None:
    assert models.ema is not None
    with torch.no_grad():
        models.policy.lm_head.weight.add_(1.0)
    models.ema.update()
    kept = {number: average.clone() for number, average in models.ema.averages.items()}
    assert all(average.dtype == torch.float32 for average in kept.values())
    folder = tmp_path / "checkpoint"
    snapshot = Snapshot(folder)
    models.take(snapshot)
    snapshot.write()
    for average in models.ema.averages.values():
        average.zero_()
    models.load(Checkpoint(1, folder, {}))
    assert all(torch.equal(models.ema.averages[number], kept[number]) for number in kept)
