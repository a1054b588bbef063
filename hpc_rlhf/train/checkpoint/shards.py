"""Sharded tensors: each rank writes its shards, and any other number of ranks reads the shards it needs.

A folder has one safetensors file per rank, and an index of which file has which part of which tensor. If tensor
parallelism splits a tensor, the index lists each tensor rank's part separately. A stage with another number of tensor
ranks joins the parts and splits the result again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.runtime.world import World

INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """A part of a tensor that this rank has in memory.

    Attributes:
        key: name of the tensor.
        start: index of its first element in the flattened tensor, or in the part of it that this tensor rank has.
        tensor: (elements,), a view of the live memory.
        mine: whether this rank writes it. If several ranks have the same shard, one of them does.
        split: if tensor parallelism splits the tensor: along which dimension, and the shape of this tensor rank's part.
    """

    key: str
    start: int
    tensor: Tensor
    mine: bool = True
    split: tuple[int, tuple[int, ...]] | None = None


def write(snapshot: Snapshot, folder: str, shards: Iterable[Shard], facts: dict[str, Any], world: World) -> None:
    """Put this rank's shards into a folder of a snapshot, and on rank 0 the index. Collective.

    Args:
        facts: JSON that ``read_facts`` returns; rank 0's are kept.
    """
    mine = [shard for shard in shards if shard.mine]
    snapshot.tensors(f"{folder}/{_file(world.rank)}", {shard.key: shard.tensor for shard in mine})
    shares = world.gather([(shard.key, shard.start, shard.tensor.numel(), shard.split) for shard in mine])
    if not world.is_main:
        return
    parts: dict[str, list[tuple[int, int, int]]] = {}
    splits = {}
    for rank, share in enumerate(shares):
        place = world.dims.coordinate("tensor", rank)
        for key, start, count, split in share:
            parts.setdefault(_index_key(key, place, world.dims.tensor), []).append((start, count, rank))
            if split is not None:
                splits[key] = split
    index = {"tensor_parallel": world.dims.tensor, "facts": facts, "parts": parts, "splits": splits}
    snapshot.data(f"{folder}/{INDEX}", json.dumps(index).encode())


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts that were written with a folder's shards."""
    facts: dict[str, Any] = json.loads((folder / INDEX).read_text())["facts"]
    return facts


def read(folder: Path, shards: Sequence[Shard], world: World) -> None:
    """Fill shards, in place, with what any number of ranks wrote.

    Raises:
        HpcRlhfError: the folder does not have all of them, for instance because the model differs.
    """
    stored = _Stored(folder, json.loads((folder / INDEX).read_text()))
    ways, place = world.dims.tensor, world.dims.coordinate("tensor", world.rank)
    if stored.ways == ways:
        pieces = [(_index_key(shard.key, place, ways), shard.start, shard.tensor) for shard in shards]
        stored.fill(pieces)
        return
    for shard in shards:  # one whole tensor at a time
        values = stored.part(shard, place, ways).flatten()[shard.start : shard.start + shard.tensor.numel()]
        if len(values) < shard.tensor.numel():
            raise stored.unfit(f"it has {len(values)} of {shard.tensor.numel()} elements of {shard.key}")
        with torch.no_grad():
            shard.tensor.copy_(values)


class _Stored:
    """A folder of shards.

    Attributes:
        ways: tensor ranks that wrote it.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.ways: int = index["tensor_parallel"]
        self.parts: dict[str, list[tuple[int, int, int]]] = index["parts"]
        if self.ways > 1 and "splits" not in index:
            raise HpcRlhfError(
                "an earlier version made the checkpoint, and kept embeddings whole under tensor_parallel",
                where=str(folder),
                hint="let that version finish the stage, or start it in another run_dir",
            )
        self.splits: dict[str, tuple[int, list[int]]] = index.get("splits", {})

    def fill(self, pieces: Sequence[tuple[str, int, Tensor]]) -> None:
        """Read parts of tensors, each given by its name in the index and its first element."""
        from safetensors import safe_open

        wanted: dict[int, list[tuple[str, int, int, Tensor]]] = {}
        for name, first, tensor in pieces:
            end, available = first + tensor.numel(), 0
            for start, count, rank in self.parts.get(name, ()):
                low, high = max(start, first), min(start + count, end)
                if low < high:
                    part = tensor[low - first : high - first]
                    wanted.setdefault(rank, []).append((name, low - start, high - start, part))
                    available += high - low
            if available != tensor.numel():
                raise self.unfit(f"it has {available} of {tensor.numel()} elements of {_key(name)}")
        for rank, cuts in sorted(wanted.items()):
            with safe_open(self.folder / _file(rank), framework="pt") as file, torch.no_grad():
                for name, low, high, part in cuts:
                    part.copy_(file.get_slice(_key(name))[low:high])

    def part(self, shard: Shard, place: int, ways: int) -> Tensor:
        """The part that one of ``ways`` tensor ranks has of a shard's tensor, which another number of them wrote."""
        key, split = shard.key, self.splits.get(shard.key)
        dim = (split or shard.split or (0,))[0]
        names = [_index_key(key, number, self.ways) for number in range(self.ways if split else 1)]
        parts = [torch.empty(self._size(name), dtype=shard.tensor.dtype) for name in names]
        self.fill([(name, 0, part) for name, part in zip(names, parts, strict=True)])
        if split and any(part.numel() != math.prod(split[1]) for part in parts):
            raise self.unfit(f"it does not have all of {key}")
        whole = torch.cat([part.view(split[1]) for part in parts], dim) if split else parts[0]
        if shard.split is None:
            return whole
        shape = list(shard.split[1])
        if split is None and whole.numel() == ways * math.prod(shape):
            whole = whole.view(*shape[:dim], -1, *shape[dim + 1 :])
        if list(whole.shape) != [*shape[:dim], ways * shape[dim], *shape[dim + 1 :]]:
            raise self.unfit(f"the size of its {key} is {tuple(whole.shape)}")
        return whole.narrow(dim, place * shape[dim], shape[dim])

    def _size(self, name: str) -> int:
        return max((start + count for start, count, _ in self.parts.get(name, ())), default=0)

    def unfit(self, why: str) -> HpcRlhfError:
        return HpcRlhfError(
            f"the checkpoint does not fit this stage: {why}",
            where=str(self.folder),
            hint="continue with the spec that it was made with, or choose another run_dir",
        )


def _index_key(key: str, place: int, ways: int) -> str:
    """The name of a tensor rank's part of a tensor in the index: tensor ranks have different parts of one name."""
    return f"{key}@{place}" if ways > 1 else key


def _key(name: str) -> str:
    """The tensor's name in the files."""
    return name.rpartition("@")[0] or name


def _file(rank: int) -> str:
    return f"{rank:05d}.safetensors"
