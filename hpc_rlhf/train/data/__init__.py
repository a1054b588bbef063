"""Rows of many formats to token batches, the same on any number of ranks."""
