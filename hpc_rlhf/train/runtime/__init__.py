"""The ranks of a stage: world, stop signals, consensus, watchdog, seeds."""
