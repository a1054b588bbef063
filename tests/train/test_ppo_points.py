"""What a correct PPO must satisfy, point by point, with the tests that fail if it does not.

1.  Padding is not EOS, and EOS is learned like any response token.
    models/test_tokenizers.py::test_padding_bos_and_eos_are_separate_tokens
    test_ppo_points.py::test_a_response_of_only_eos_is_learned_from
    rollout/test_experience.py::test_numbers_of_a_response_do_not_depend_on_the_batch
2.  Log-probabilities do not depend on the batch; positions start at 0 in each sequence.
    models/test_language_model.py::test_log_probabilities_do_not_depend_on_the_batch
    models/test_language_model.py::test_values_do_not_depend_on_the_batch
    models/test_language_model.py::test_a_packed_model_also_accepts_padded_rows
    rollout/in_process/test_engine.py::test_greedy_responses_match_transformers_token_for_token
3.  A response ends at its first EOS before it is scored; one without EOS can be penalized.
    rollout/in_process/test_engine.py::test_a_response_ends_with_its_first_eos
    rollout/test_experience.py::test_eos_is_rewarded_and_a_response_without_it_is_penalized
4.  The score is the last real token's, and is rewarded there.
    rollout/test_experience.py::test_numbers_of_a_response_do_not_depend_on_the_batch
    algorithms/test_ppo.py::test_rewards_are_the_kl_penalty_and_the_score_at_the_last_token
5.  Sampling and all log-probabilities use one temperature.
    test_ppo_points.py::test_sampling_and_log_probabilities_use_one_temperature
    rollout/test_experience.py::test_numbers_of_a_response_do_not_depend_on_the_batch
    rollout/test_experience.py::test_against_itself_the_kl_is_exactly_zero_and_the_first_ratio_exactly_one
    test_ppo_trainer.py::test_without_updates_the_ratio_is_exactly_one
    rollout/in_process/test_engine.py::test_sampled_responses_follow_the_models_distribution
6.  Without dropout the first ratio is 1, the KL from the actor that sampled 0, and nothing clipped.
    models/test_loading.py::test_a_model_saved_with_dropout_trains_without_it
    test_ppo_points.py::test_evaluation_has_no_dropout_and_learning_has
    test_ppo_trainer.py::test_without_updates_the_ratio_is_exactly_one
    test_stages.py::test_the_first_ppo_step_starts_from_the_reference
7.  Softmax in float32; the first KL from the reference is exactly 0.
    algorithms/test_logprobs.py::test_bfloat16_logits_are_normalized_in_float32
    algorithms/test_logprobs.py::test_head_log_probs_match_those_from_logits_with_gradients
    test_ppo_points.py::test_a_bfloat16_head_is_normalized_in_float32
    rollout/test_experience.py::test_against_itself_the_kl_is_exactly_zero_and_the_first_ratio_exactly_one
8.  The reward uses k1, the metric k3; the coefficient may follow the KL.
    algorithms/test_ppo.py::test_rewards_are_the_kl_penalty_and_the_score_at_the_last_token
    algorithms/test_ppo.py::test_k3_is_never_negative_and_its_mean_is_the_kl
    test_ppo_metrics.py::test_every_number_is_over_real_tokens_and_all_responses
    algorithms/test_ppo.py::test_the_kl_coefficient_follows_the_clipped_relative_error
    test_ppo_trainer.py::test_the_kl_coefficient_carries_over_between_rollouts
9.  Scores and rewards are normalized only on request; advantages are whitened over all ranks' real tokens.
    test_ppo_points.py::test_rewards_are_not_rescaled_by_default
    test_ppo_trainer.py::test_scores_are_standardized_by_all_so_far
    rollout/test_experience.py::test_whitened_rewards_have_variance_1_around_their_mean_over_all_ranks
    rollout/test_experience.py::test_whitening_is_over_the_real_tokens_of_all_ranks
10. The critic starts from the reward model.
    test_ppo_points.py::test_the_critic_starts_from_the_reward_model_and_the_reference_from_the_actor
11. Advantages match their definition.
    algorithms/test_advantages.py::test_advantages_equal_the_double_sum_on_ragged_lengths
12. The loss does not depend on micro-batches, accumulation or ranks.
    test_ppo_trainer.py::test_the_gradient_is_the_same_in_any_micro_batches
    test_ppo_trainer.py::test_the_loss_is_divided_by_the_tokens_of_all_ranks test_agreement.py::test_curves_agree
13. Several epochs of minibatches stay stable.
    test_ppo_trainer.py::test_several_epochs_of_minibatches_learn_and_stay_close
    test_ppo_trainer.py::test_steps_end_once_the_kl_exceeds_its_limit
14. The moving average is in float32, follows every optimizer step, and is in the checkpoint.
    models/test_ema.py::test_updates_of_less_than_a_hundredth_are_not_lost
    test_ppo_points.py::test_the_moving_average_follows_every_step
    test_ppo_points.py::test_the_moving_average_is_in_the_checkpoint
    test_stages.py::test_a_stopped_chain_ends_in_the_same_weights
15. KL, entropy, ratio, clip fractions, EOS rate, length and explained variance are logged.
    test_ppo_metrics.py::test_every_number_is_over_real_tokens_and_all_responses
    test_stages.py::test_the_first_ppo_step_starts_from_the_reference
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.algorithms.logprobs import head_log_probs
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.loading import load_reward
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, Sampling
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.policy.models import ModelSources
from hpc_rlhf.train.stages.ppo.models import PpoModels
from tests.train import tiny
from tests.train.ppo_trainers import PROMPTS, RESPONSES, ROLLOUT, Steps, trainer_of

HERE = Path(__file__).parent


def test_every_point_names_existing_tests() -> None:
    assert __doc__ is not None
    points = re.split(r"^(\d+)\. ", __doc__, flags=re.MULTILINE)[1:]
    assert [int(number) for number in points[::2]] == list(range(1, 16))
    for text in points[1::2]:
        named = re.findall(r"(\S+\.py)::(\w+)", text)
        assert named
        for file, test in named:
            assert f"\ndef {test}(" in (HERE / file).read_text(), f"{file} has no {test}"


def test_a_response_of_only_eos_is_learned_from(steps: Callable[[float], Steps]) -> None:
    optimizer = steps(0.0)
    trainer = trainer_of(whiten_advantages=False)
    stats = trainer.learn(trainer.evaluate(Rollout.of(PROMPTS[:2], [[tiny.EOS], [tiny.EOS]])))
    assert stats["tokens"] == 2
    head = optimizer.gradients[0]
    assert head.norm() > 1e-3


def test_sampling_and_log_probabilities_use_one_temperature(steps: Callable[[float], Steps]) -> None:
    steps(0.0)
    requests: list[GenerationRequest] = []

    def generate(request: GenerationRequest) -> Rollout:
        requests.append(request)
        return ROLLOUT

    trainer = trainer_of(temperature=0.6, top_p=0.9, top_k=7)
    trainer.backend = SimpleNamespace(generate=generate, sync_weights=lambda model: None)
    experience = trainer.evaluate(trainer.roll_out(PROMPTS, [], bool))
    assert [request.sampling for request in requests] == [Sampling(0.6, 0.9, 7)]
    ids = torch.tensor([PROMPTS[0] + RESPONSES[0]])
    with torch.no_grad():
        logits = tiny.causal("llama")(input_ids=ids).logits[0, len(PROMPTS[0]) - 1 : -1] / 0.6
    expected = logits.log_softmax(-1).gather(1, torch.tensor(RESPONSES[0]).unsqueeze(1)).squeeze(1)
    for log_probs in (experience.log_probs, experience.ref_log_probs):
        torch.testing.assert_close(log_probs[0, : len(RESPONSES[0])], expected, atol=2e-5, rtol=1e-5)
    assert trainer.learn(experience)["ratio"] == experience.mask.sum().item()


def test_evaluation_has_no_dropout_and_learning_has() -> None:
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


def test_a_bfloat16_head_is_normalized_in_float32() -> None:
    # Logits that bfloat16 represents exactly, so that none are rounded.
    hidden, weight = (torch.randint(-1, 2, (rows, 16)).bfloat16() for rows in (5, 1000))
    tokens = torch.arange(5)
    log_probs, entropies = head_log_probs(hidden, weight, None, tokens, 1.0, True)
    logits = F.linear(hidden, weight).float().log_softmax(-1)
    torch.testing.assert_close(log_probs, logits[torch.arange(5), tokens], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropies, -(logits.exp() * logits).sum(-1), atol=1e-4, rtol=1e-5)


def test_rewards_are_not_rescaled_by_default() -> None:
    experience = trainer_of(kl_coef=0.0, lam=1.0, score_clip=100.0).evaluate(ROLLOUT)
    torch.testing.assert_close(experience.returns[:, 0], experience.scores, atol=1e-5, rtol=1e-5)


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
    start = ModelSources(str(tmp_path / "sft"), str(tmp_path / "reward"), configs, longest=32, updates=1, seed=1)
    return PpoModels(spec, start, range(tiny.VOCABULARY), world)


def test_the_critic_starts_from_the_reward_model_and_the_reference_from_the_actor(
    models: PpoModels, tmp_path: Path
) -> None:
    kept = load_reward(str(tmp_path / "reward"), torch.float32, None).state_dict()
    for model in (models.critic, models.reward):
        state = model.state_dict()
        assert state.keys() == kept.keys()
        assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert kept["classifier.score.weight"].abs().sum() > 0
    assert all(parameter.requires_grad for parameter in models.critic.parameters())
    assert not any(parameter.requires_grad for parameter in models.reward.parameters())
    actor, ref = models.policy.state_dict(), models.ref_policy.state_dict()
    assert all(torch.equal(actor[name], ref[name]) for name in actor)
    assert actor["lm_head.weight"].data_ptr() != ref["lm_head.weight"].data_ptr()


def test_the_moving_average_follows_every_step(steps: Callable[[float], Steps]) -> None:
    optimizer = steps(1e-4)
    trainer = trainer_of(ppo_epochs=2, minibatches=3)
    updates: list[int] = []
    trainer.models.ema = SimpleNamespace(update=lambda: updates.append(optimizer.count))  # type: ignore[assignment]
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
    models.save(snapshot)
    snapshot.write()
    for average in models.ema.averages.values():
        average.zero_()
    models.load(Checkpoint(1, folder, {}))
    assert all(torch.equal(models.ema.averages[number], kept[number]) for number in kept)
