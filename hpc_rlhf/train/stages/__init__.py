"""The stages: each file reads top to bottom as the numbered steps of its method."""
