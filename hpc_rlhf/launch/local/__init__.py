"""Runs the stages of a run without Slurm: on this machine, or on those of a hostfile."""
