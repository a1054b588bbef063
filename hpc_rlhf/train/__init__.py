"""Compute node: one process per GPU. Torch lives here and nowhere else."""
