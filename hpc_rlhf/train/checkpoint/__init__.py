"""Checkpoints: taken, written, verified and loaded."""
