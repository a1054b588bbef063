"""A read-only page over all runs below a folder."""
