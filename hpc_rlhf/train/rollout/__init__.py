"""Responses from the model in training, and the experience made of them."""
