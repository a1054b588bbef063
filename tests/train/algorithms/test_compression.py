"""1-bit compression: bytes round-trip, and error feedback sends later what compression leaves out."""

from __future__ import annotations

import pytest
import torch

from hpc_rlhf.train.algorithms.compression import BLOCK, decode, encode, pack_bits, unpack_bits


def test_packed_bits_round_trip() -> None:
    bits = torch.rand(3, 5, 64) < 0.3
    packed = pack_bits(bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 5, 8))
    assert torch.equal(unpack_bits(packed), bits)
    assert packed[0, 0, 0].item() == sum(int(bit) << place for place, bit in enumerate(bits[0, 0, :8]))


def test_encoded_size_is_one_bit_per_number_plus_magnitudes() -> None:
    assert encode(torch.randn(2, 8 * BLOCK)).numel() == 2 * 8 * (BLOCK // 8 + 4)


def test_numbers_decode_to_their_sign_times_the_blocks_mean() -> None:
    values = torch.randn(2, 3 * BLOCK) * torch.tensor([1.0, 50.0, 0.0]).repeat_interleave(BLOCK)
    values[0, 0] = 0.0
    decoded = decode(encode(values))
    for row in range(2):
        for block in range(3):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            magnitude = values[row, part].abs().mean()
            expected = torch.where(values[row, part] >= 0, magnitude, -magnitude)
            assert torch.equal(decoded[row, part], expected)


def test_the_magnitude_minimizes_the_error() -> None:
    values = torch.randn(1, BLOCK)
    decoded = decode(encode(values))
    best = (values - decoded).square().sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (values - factor * decoded).square().sum() > best


@pytest.mark.parametrize("rounds", [1, 7, 50])
def test_with_error_feedback_only_the_last_error_is_missing(rounds: int) -> None:
    """What was sent and the remaining error add up to the original."""
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
