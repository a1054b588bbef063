"""Ours and peers on the same model, data and device: ``make bench``."""
