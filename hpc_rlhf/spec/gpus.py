"""GPUs by name, with their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Gpu:
    """The data sheet of a GPU."""

    gib: float  # usable memory, a little less than the nominal size
    half: float  # TFLOP/s in bf16 or fp16, dense, accumulated in float32
    single: float  # TFLOP/s in float32, without tensor cores
    bandwidth: float  # of the memory, in GB/s
    link: float  # GB/s to the other GPUs of a node, one way: NVLink, Infinity Fabric or PCIe
    bf16: bool = True  # whether it is as fast as fp16

    def peak(self, precision: str) -> float:
        """FLOP/s in bf16, fp16 or fp32."""
        slow = precision == "fp32" or (precision == "bf16" and not self.bf16)
        return 1e12 * (self.single if slow else self.half)


GPUS = {
    "a10-24g": Gpu(22.0, 125, 31.2, 600, 32),
    "a30-24g": Gpu(23.5, 165, 10.3, 933, 32),
    "a40-48g": Gpu(44.4, 149.7, 37.4, 696, 32),
    "a6000-48g": Gpu(47.4, 154.8, 38.7, 768, 32),
    "a100-40g": Gpu(39.4, 312, 19.5, 1555, 300),
    "a100-80g": Gpu(79.1, 312, 19.5, 2039, 300),
    "b200-180g": Gpu(178.3, 2250, 75, 8000, 900),
    "gh200-96g": Gpu(94.5, 989, 67, 4000, 450),
    "h100-80g": Gpu(79.1, 989, 67, 3350, 450),
    "h200-141g": Gpu(139.7, 989, 67, 4800, 450),
    "l4-24g": Gpu(22.0, 121, 30.3, 300, 32),
    "l40s-48g": Gpu(44.4, 362, 91.6, 864, 32),
    "mi250x-64g": Gpu(63.9, 191.5, 23.9, 1638, 100),
    "mi300x-192g": Gpu(191.7, 1307, 163.4, 5300, 448),
    "rtx3090-24g": Gpu(23.6, 71, 35.6, 936, 32),
    "rtx4090-24g": Gpu(23.5, 165, 82.6, 1008, 32),
    "v100-16g": Gpu(15.7, 125, 15.7, 900, 150, bf16=False),
    "v100-32g": Gpu(31.7, 125, 15.7, 900, 150, bf16=False),
}
_UNITS = {"G": 2**30, "GiB": 2**30, "M": 2**20, "MiB": 2**20, "": 1}


def gpu_bytes(gpu: str) -> int:
    """The memory of a GPU in bytes: by its name, or from a size such as 80G (of 2**30 bytes) or 85899345920.

    Raises:
        ValueError: it is neither a known name nor a size.
    """
    if gpu in GPUS:
        return int(GPUS[gpu].gib * 2**30)
    size = re.fullmatch(r"([1-9][0-9]{0,14})(G|GiB|M|MiB|)", gpu)
    if size is None:
        near = get_close_matches(gpu.lower(), GPUS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(GPUS)}"
        raise ValueError(f"must be a known GPU, or its memory such as 80G; {hint}")
    return int(size[1]) * _UNITS[size[2]]


def known_gpu(gpu: str) -> str:
    """Return the text if it names a GPU; raise ValueError otherwise."""
    gpu_bytes(gpu)
    return gpu
