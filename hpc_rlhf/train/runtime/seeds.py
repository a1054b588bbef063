"""Seeds as pure functions of what they are for, so that nothing random depends on what came before."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(*parts: object) -> int:
    """A 63-bit seed from a run's seed and what it is for (stage, step, rank, purpose, …)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def unit(*parts: object) -> float:
    """A number in [0, 1) that is uniform over the parts."""
    return derive(*parts) / 2**63


def reseed(*parts: object) -> None:
    """Seed every generator that training may draw from."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
