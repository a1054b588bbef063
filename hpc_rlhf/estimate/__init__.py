"""Estimates of the memory, time and disk space of a stage, without torch in this process."""
