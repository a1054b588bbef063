from hpc_rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine

engine = DeepSpeedRLHFEngine(
    actor_model_name_or_path="jobs/runs/tiny/stages/sft/model",
    critic_model_name_or_path="jobs/runs/tiny/stages/reward/model",
    num_total_iters=2,
    args={"actor_lr": 1e-5, "micro_batch": 2},  # any fields of stages.ppo
)
trainer = DeepSpeedPPOTrainer(engine=engine)
for prompt_batch in (
    ["What colour is snow?", "What does a cow say?"],
    ["Name the capital of Peru.", "Not hot, but what?"],
):
    experience = trainer.generate_experience(prompt_batch)
    actor_loss, critic_loss = trainer.train_rlhf(experience)
    print(actor_loss, critic_loss, trainer.metrics["reward"], trainer.metrics["kl"])
engine.save_pretrained("actor")
