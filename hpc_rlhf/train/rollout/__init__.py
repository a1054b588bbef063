"""Generating answers from a model in training."""
