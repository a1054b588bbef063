"""Where a run's time went."""
