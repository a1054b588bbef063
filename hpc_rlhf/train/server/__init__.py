"""A small server of the OpenAI API for one chat model."""
