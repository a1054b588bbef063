from collections.abc import Mapping, Sequence

from hpc_rlhf import DeepSpeedGRPOEngine, DeepSpeedGRPOTrainer

engine = DeepSpeedGRPOEngine(
    actor_model_name_or_path="jobs/runs/tiny/stages/sft/model",
    num_total_iters=2,
    args={"lr": 1e-5, "group_size": 4, "micro_batch": 8},  # any fields of stages.grpo
)


class Contains:
    """1 if the response contains the answer, otherwise 0: a `RewardSource`."""

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[object]],
    ) -> list[float | None]:
        texts = [engine.tokenizer.decode(response) for response in responses]
        return [float(str(answer) in text) for text, answer in zip(texts, columns["answer"], strict=True)]


trainer = DeepSpeedGRPOTrainer(engine=engine, rewards=Contains())
questions = ["What colour is snow?", "What does a cow say?"]
for _ in range(2):
    experience = trainer.generate_experience(questions, {"answer": ["white", "moo"]})
    loss = trainer.train_rlhf(experience)
    print(loss, trainer.metrics["reward"], trainer.metrics["frac_reward_zero_std"])
engine.save_pretrained("actor")
