"""Slurm's commands, states and options."""
