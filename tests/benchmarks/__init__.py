"""Our stages and their peers on the same model, data and device: ``make bench``."""
