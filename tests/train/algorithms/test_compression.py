"""Numbers as signs: nothing is lost on the way through bytes, and what compression leaves out comes later."""

from __future__ import annotations

import pytest
import torch

from hpc_rlhf.train.algorithms.compression import BLOCK, decode, encode, pack_bits, unpack_bits


def test_bits_come_back_from_their_bytes() -> None:
    bits = torch.rand(3, 5, 64) < 0.3
    packed = pack_bits(bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 5, 8))
    assert torch.equal(unpack_bits(packed), bits)
    assert packed[0, 0, 0].item() == sum(int(bit) << place for place, bit in enumerate(bits[0, 0, :8]))


def test_a_number_takes_a_bit_and_its_share_of_a_magnitude() -> None:
    assert encode(torch.randn(2, 8 * BLOCK)).numel() == 2 * 8 * (BLOCK // 8 + 4)


def test_numbers_come_back_as_their_signs_times_their_blocks_mean() -> None:
    values = torch.randn(2, 3 * BLOCK) * torch.tensor([1.0, 50.0, 0.0]).repeat_interleave(BLOCK)
    values[0, 0] = 0.0
    found = decode(encode(values))
    for row in range(2):
        for block in range(3):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            magnitude = values[row, part].abs().mean()
            expected = torch.where(values[row, part] >= 0, magnitude, -magnitude)
            assert torch.equal(found[row, part], expected)


def test_no_other_magnitude_is_closer() -> None:
    values = torch.randn(1, BLOCK)
    found = decode(encode(values))
    best = (values - found).square().sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (values - factor * found).square().sum() > best


@pytest.mark.parametrize("rounds", [1, 7, 50])
def test_with_the_error_fed_back_only_the_last_one_is_missing(rounds: int) -> None:
    """The paper's point: whatever was sent and what is still to be sent add up to what there was."""
    error, sent, whole = (torch.zeros(1, 2 * BLOCK, dtype=torch.float32) for _ in range(3))
    sizes = []
    for _ in range(rounds):
        values = torch.randn(1, 2 * BLOCK) + 0.1
        whole += values
        corrected = values + error
        part = decode(encode(corrected))
        error = corrected - part
        sent += part
        sizes.append(error.square().mean().sqrt().item())
    torch.testing.assert_close(sent + error, whole, atol=1e-4, rtol=1e-4)
    assert max(sizes) < 5, "errors do not pile up"
