"""Tests; they mirror hpc_rlhf/."""
