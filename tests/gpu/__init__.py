"""Checks for a machine with a GPU: correctness there, and speed beside transformers. scripts/gpu-check.sh runs them."""
