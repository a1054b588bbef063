"""Sources of rewards for responses."""
