"""A rank's share of a checkpoint: copied at once, then written and hashed while training continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# Names in safetensors of the types that are saved.
_SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Snapshot:
    """Files to be written into a folder.

    Args:
        copy: copy tensors to host memory, as far as there is room, so that training may change them.
        ranks_here: ranks that share this machine's memory.

    Attributes:
        live: some tensors are not copies, so they must not change until all is written.
        size: approximate bytes to be written.
    """

    def __init__(self, folder: Path, copy: bool = False, ranks_here: int = 1) -> None:
        self.folder = folder
        self.live = not copy
        self.size = 0
        self._ranks_here = ranks_here
        self._files: list[tuple[str, Callable[[_Hashed], object]]] = []

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Add a safetensors file of tensors, which may be views of the same memory."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if not self.live and size * self._ranks_here * 1.1 > free_memory():
            self.live = True
        copies = tensors if self.live else {key: t.detach().to("cpu", copy=True) for key, t in tensors.items()}
        self.size += size
        self._files.append((name, partial(_write_safetensors, copies)))

    def data(self, name: str, data: bytes) -> None:
        """Add a file of bytes."""
        self.size += len(data)
        self._files.append((name, lambda file: file.write(data)))

    def write(self) -> dict[str, Any]:
        """Write all files and flush them to disk; describes them as ``manifest.describe`` does."""
        facts = {}
        for name, write in self._files:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as raw:
                file = _Hashed(raw)
                write(file)
                raw.flush()
                os.fsync(raw.fileno())
            facts[name] = {"bytes": file.size, "sha256": file.digest.hexdigest()}
        self._files = []  # the copies are large
        return facts


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        written = self.file.write(data)
        self.digest.update(data)
        self.size += written
        return written


def _write_safetensors(tensors: dict[str, Tensor], file: _Hashed) -> None:
    """Write tensors one by one: safetensors' own writers take a file name, or all tensors in memory twice."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype, shape = _SAFETENSORS[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def free_memory() -> float:
    """Bytes of free memory, on the machine and in this process's control group."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024.0 * next(int(words[1]) for words in lines if words[0] == "MemAvailable:")
    try:
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        most, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        return min(free, float(most) - float(used))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free
