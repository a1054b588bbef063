"""A model folder as one GGUF file, for llama.cpp. What is not known to be mapped right is refused."""
