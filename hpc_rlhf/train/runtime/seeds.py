"""Seeds as pure functions of their purpose, so that no random number depends on what ran before."""

from __future__ import annotations

import hashlib
import random


def derive(*parts: object) -> int:
    """A 63-bit seed from a run's seed and its purpose (stage, step, rank, …)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def unit(*parts: object) -> float:
    """A number in [0, 1), uniformly distributed over the parts."""
    return derive(*parts) / 2**63


def reseed(*parts: object) -> None:
    """Seed every random generator that training may use."""
    import numpy as np  # what only reads data has no use for these
    import torch

    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
