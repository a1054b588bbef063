"""Memory, time and disk that a stage takes, estimated without torch."""
