"""The vLLM rollout backend: responses by an engine in a process, and a Python, of its own."""
