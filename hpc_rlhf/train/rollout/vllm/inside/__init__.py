"""Code for vLLM's own Python, which has this folder on its path."""
