"""Sharded tensors: each rank writes its shards, and any other number of ranks reads the shards it needs.

A folder has one safetensors file per rank, and an index of which file has which part of which tensor.
"""

from __future__ import annotations

import json
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
        key: name of the whole tensor; with tensor parallelism, of the whole that one tensor rank has.
        start: index of its first element in the flattened whole tensor.
        tensor: (elements,), a view of the live memory.
        mine: whether this rank writes it. If several ranks have the same shard, one of them does.
    """

    key: str
    start: int
    tensor: Tensor
    mine: bool = True


def write(snapshot: Snapshot, folder: str, shards: Iterable[Shard], facts: dict[str, Any], world: World) -> None:
    """Put this rank's shards into a folder of a snapshot, and on rank 0 the index. Collective.

    Args:
        facts: JSON that ``read_facts`` returns; rank 0's are kept.
    """
    mine = [shard for shard in shards if shard.mine]
    snapshot.tensors(f"{folder}/{_file(world.rank)}", {shard.key: shard.tensor for shard in mine})
    shares = world.gather([(shard.key, shard.start, shard.tensor.numel()) for shard in mine])
    if not world.is_main:
        return
    parts: dict[str, list[tuple[int, int, int]]] = {}
    for rank, share in enumerate(shares):
        for key, start, count in share:
            parts.setdefault(_index_key(key, rank, world), []).append((start, count, rank))
    index = {"tensor_parallel": world.dims.tensor, "facts": facts, "parts": parts}
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
    from safetensors import safe_open

    index = json.loads((folder / INDEX).read_text())
    if index["tensor_parallel"] != world.dims.tensor:
        raise _unfit(folder, f"it was made with tensor_parallel: {index['tensor_parallel']}")
    wanted: dict[int, list[tuple[Shard, int, int, int]]] = {}
    for shard in shards:
        end, available = shard.start + shard.tensor.numel(), 0
        for start, count, rank in index["parts"].get(_index_key(shard.key, world.rank, world), ()):
            low, high = max(start, shard.start), min(start + count, end)
            if low < high:
                wanted.setdefault(rank, []).append((shard, start, low, high))
                available += high - low
        if available != shard.tensor.numel():
            raise _unfit(folder, f"it has {available} of {shard.tensor.numel()} elements of {shard.key}")
    for rank, cuts in sorted(wanted.items()):
        with safe_open(folder / _file(rank), framework="pt") as file, torch.no_grad():
            for shard, start, low, high in cuts:
                values = file.get_slice(shard.key)[low - start : high - start]
                shard.tensor[low - shard.start : high - shard.start].copy_(values)


def _index_key(key: str, rank: int, world: World) -> str:
    """The name of a rank's tensor in the index: tensor ranks have different tensors of one name."""
    return f"{key}@{world.dims.coordinate('tensor', rank)}" if world.dims.tensor > 1 else key


def _file(rank: int) -> str:
    return f"{rank:05d}.safetensors"


def _unfit(folder: Path, why: str) -> HpcRlhfError:
    return HpcRlhfError(
        f"the checkpoint does not fit this stage: {why}",
        where=str(folder),
        hint="continue with the spec that it was made with, or choose another run_dir",
    )
