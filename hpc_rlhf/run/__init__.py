"""A run directory: its layout, ledger, manifests and logs. Both halves of the package meet in it."""
