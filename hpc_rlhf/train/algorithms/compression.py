"""1-bit compression: each number as its sign, and one float32 magnitude per block."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers that share a magnitude, which adds 3 % to the bits of the signs.
BLOCK = 1024


def pack_bits(bits: Tensor) -> Tensor:
    """Eight bits to a byte, the first in the lowest place.

    Args:
        bits: (…, 8 * bytes), bool.

    Returns:
        (…, bytes), uint8.
    """
    grouped = bits.unflatten(-1, (-1, 8)).to(torch.uint8)
    packed = grouped[..., 0].clone()
    for place in range(1, 8):
        packed |= grouped[..., place] << place
    return packed


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of ``pack_bits``: (…, bytes), uint8, to (…, 8 * bytes), bool."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> places) & 1).flatten(-2).bool()


def encode(values: Tensor) -> Tensor:
    """Signs and magnitudes of numbers, as bytes to send.

    A block's magnitude is the mean of its absolute values, which minimizes the squared error (1-bit Adam,
    arXiv 2102.02888).

    Args:
        values: (rows, length), float32; length is a multiple of BLOCK.

    Returns:
        (rows, bytes), uint8: the blocks' magnitudes, then the signs.
    """
    magnitudes = values.unflatten(1, (-1, BLOCK)).abs().mean(dim=2)
    return torch.cat([magnitudes.view(torch.uint8), pack_bits(values >= 0)], dim=1)


def decode(encoded: Tensor) -> Tensor:
    """The inverse of ``encode``: each number is plus or minus its block's magnitude.

    Args:
        encoded: (rows, bytes), uint8.

    Returns:
        (rows, length), float32.
    """
    blocks = encoded.shape[1] // (4 + BLOCK // 8)
    magnitudes = encoded[:, : 4 * blocks].contiguous().view(torch.float32)
    signs = unpack_bits(encoded[:, 4 * blocks :]).unflatten(1, (blocks, BLOCK))
    return torch.where(signs, magnitudes.unsqueeze(2), -magnitudes.unsqueeze(2)).flatten(1)
