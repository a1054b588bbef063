"""GPUs by name, and the memory that they have."""

from __future__ import annotations

import re
from difflib import get_close_matches

# GiB that a program finds on each, which is a little less than the name says.
_GIB = {
    "a10-24g": 22.0, "a30-24g": 23.5, "a40-48g": 44.4, "a6000-48g": 47.4, "a100-40g": 39.4, "a100-80g": 79.1,
    "b200-180g": 178.3, "gh200-96g": 94.5, "h100-80g": 79.1, "h200-141g": 139.7, "l4-24g": 22.0, "l40s-48g": 44.4,
    "mi250x-64g": 63.9, "mi300x-192g": 191.7, "rtx3090-24g": 23.6, "rtx4090-24g": 23.5, "v100-16g": 15.7,
    "v100-32g": 31.7,
}  # fmt: skip
_UNITS = {"G": 2**30, "GiB": 2**30, "M": 2**20, "MiB": 2**20, "": 1}


def gpu_bytes(gpu: str) -> int:
    """Bytes of a GPU: by its name, or as said, such as 80G (of 2**30 bytes) or 85899345920.

    Raises:
        ValueError: there is no such name.
    """
    if gpu in _GIB:
        return int(_GIB[gpu] * 2**30)
    size = re.fullmatch(r"([1-9][0-9]{0,14})(G|GiB|M|MiB|)", gpu)
    if size is None:
        near = get_close_matches(gpu.lower(), _GIB, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_GIB)}"
        raise ValueError(f"must be a known GPU or its memory, such as 80G; {hint}")
    return int(size[1]) * _UNITS[size[2]]


def known_gpu(gpu: str) -> str:
    """The text itself, once it is known to name a GPU. Raises ValueError where it does not."""
    gpu_bytes(gpu)
    return gpu
