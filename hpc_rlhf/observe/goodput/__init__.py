"""Where a run's time went: productive, lost, queued, and so on."""
