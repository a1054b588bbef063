"""Rollouts by the training processes themselves."""
