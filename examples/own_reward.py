"""PPO with a reward of your own in place of the reward model: here, short responses earn more."""

from collections.abc import Mapping, Sequence

from hpc_rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine


class Brevity:
    """A `RewardSource`: any object with this method is one."""

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[object]],
    ) -> list[float | None]:
        return [1.0 - len(response) / 256 for response in responses]


engine = DeepSpeedRLHFEngine(
    actor_model_name_or_path="jobs/runs/tiny/stages/sft/model",
    critic_model_name_or_path="jobs/runs/tiny/stages/reward/model",
    num_total_iters=2,
    args={"actor_lr": 1e-5, "micro_batch": 2},
)
trainer = DeepSpeedPPOTrainer(engine=engine, rewards=Brevity())
for _ in range(2):
    trainer.train_rlhf(trainer.generate_experience(["What colour is snow?", "What does a cow say?"]))
    print(trainer.metrics["reward"], trainer.metrics["answer_tokens"])
