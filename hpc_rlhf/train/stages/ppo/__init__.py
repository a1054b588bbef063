"""PPO (arXiv 1707.06347) against a reward model."""

from hpc_rlhf.train.stages.ppo.stage import run

__all__ = ["run"]
