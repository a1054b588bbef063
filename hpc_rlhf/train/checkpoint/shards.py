"""Tensors in pieces: many ranks write what each of them has, and any other number of ranks reads what each of them needs.

A folder holds one safetensors file a rank and an index that says which file has which part of which tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.runtime.world import World

INDEX = "index.json"


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that this rank has in memory.

    Attributes:
        key: names the whole tensor. With tensor parallelism, what one place in the group calls the whole.
        start: number of its first element in the whole tensor, laid flat.
        tensor: (elements,) a view of the memory it is kept in.
        mine: whether this rank writes it; of what several ranks have, one does.
    """

    key: str
    start: int
    tensor: Tensor
    mine: bool = True


def write(
    snapshot: Snapshot, folder: str, pieces: Iterable[Piece], facts: dict[str, Any], world: World
) -> None:
    """Put this rank's pieces into a folder of a snapshot, and from rank 0 the index. Collective.

    Args:
        facts: JSON that ``read_facts`` gives back; rank 0's are kept.
    """
    mine = [piece for piece in pieces if piece.mine]
    snapshot.tensors(f"{folder}/{_file(world.rank)}", {piece.key: piece.tensor for piece in mine})
    shares = world.gather([(piece.key, piece.start, piece.tensor.numel()) for piece in mine])
    if not world.is_main:
        return
    parts: dict[str, list[tuple[int, int, int]]] = {}
    for rank, share in enumerate(shares):
        for key, start, count in share:
            parts.setdefault(_whole(key, rank, world), []).append((start, count, rank))
    index = {"tensor_parallel": world.dims.tensor, "facts": facts, "parts": parts}
    snapshot.data(f"{folder}/{INDEX}", json.dumps(index).encode())


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts that were written with a folder's pieces."""
    facts: dict[str, Any] = json.loads((folder / INDEX).read_text())["facts"]
    return facts


def read(folder: Path, pieces: Sequence[Piece], world: World) -> None:
    """Fill pieces, in place, with what any number of ranks wrote.

    Raises:
        HpcRlhfError: the folder does not have all of it, as when the model is another one.
    """
    from safetensors import safe_open

    index = json.loads((folder / INDEX).read_text())
    if index["tensor_parallel"] != world.dims.tensor:
        raise _unfit(folder, f"it was made with tensor_parallel: {index['tensor_parallel']}")
    wanted: dict[int, list[tuple[Piece, int, int, int]]] = {}
    for piece in pieces:
        end, found = piece.start + piece.tensor.numel(), 0
        for start, count, rank in index["parts"].get(_whole(piece.key, world.rank, world), ()):
            low, high = max(start, piece.start), min(start + count, end)
            if low < high:
                wanted.setdefault(rank, []).append((piece, start, low, high))
                found += high - low
        if found != piece.tensor.numel():
            raise _unfit(folder, f"it has {found} of {piece.tensor.numel()} elements of {piece.key}")
    for rank, cuts in sorted(wanted.items()):
        with safe_open(folder / _file(rank), framework="pt") as file, torch.no_grad():
            for piece, start, low, high in cuts:
                values = file.get_slice(piece.key)[low - start : high - start]
                piece.tensor[low - piece.start : high - piece.start].copy_(values)


def _whole(key: str, rank: int, world: World) -> str:
    """What the index calls a rank's tensor: the places of a tensor-parallel group have different ones of one name."""
    return f"{key}@{world.dims.coordinate('tensor', rank)}" if world.dims.tensor > 1 else key


def _file(rank: int) -> str:
    return f"{rank:05d}.safetensors"


def _unfit(folder: Path, why: str) -> HpcRlhfError:
    return HpcRlhfError(
        f"the checkpoint does not fit this stage: {why}",
        where=str(folder),
        hint="go on with the spec that it was made with, or choose another run_dir",
        exit_code=RUN_FAILED,
    )
