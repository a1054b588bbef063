"""GRPO (arXiv 2402.03300) and its relatives, without a critic."""

from hpc_rlhf.train.stages.grpo.stage import run

__all__ = ["run"]
