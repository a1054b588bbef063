"""Reads a run directory and shows what it finds; changes nothing."""
