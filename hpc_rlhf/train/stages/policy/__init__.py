"""What PPO and GRPO have in common: responses are sampled and scored, and the actor learns from them."""
