"""Evaluation of a run's models on held-out data."""

from hpc_rlhf.train.stages.eval.stage import run

__all__ = ["run"]
