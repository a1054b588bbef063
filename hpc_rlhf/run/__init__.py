"""A run directory: its layout, ledger, manifests and logs."""
