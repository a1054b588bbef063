"""Pure tensor functions: no I/O, no distributed calls, no configuration."""
