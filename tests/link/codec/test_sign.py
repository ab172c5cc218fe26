"""Sign with scale against a slow reference, and what it promises error feedback."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.link.codec.sign import Sign

numbers = st.floats(-(2.0**60), 2.0**60, width=32)


def round_trip(stage: Sign, values: Tensor) -> Tensor:
    return stage.decode(stage.encode(values, 0), values.numel())


def read(data: Tensor, count: int, block: int) -> list[float]:
    """The values of an encoding, byte by byte."""
    raw = bytes(data.tolist())
    blocks = -(-count // block)
    scales = [struct.unpack("<f", b"\0\0" + raw[2 * index : 2 * index + 2])[0] for index in range(blocks)]
    bits = raw[2 * blocks :]
    return [
        -scales[index // block] if bits[index // 8] >> (index % 8) & 1 else scales[index // block]
        for index in range(count)
    ]


@settings(deadline=None)
@given(st.lists(numbers, max_size=60))
def test_sign_times_mean_magnitude(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    data = Sign(block=16).encode(values, 0)
    out = Sign(block=16).decode(data, len(numbers))
    assert out.tolist() == read(data, len(numbers), 16)
    for begin in range(0, len(numbers), 16):
        part = numbers[begin : begin + 16]
        mean = sum(abs(value) for value in part) / len(part)
        for value, decoded in zip(part, out[begin : begin + 16].tolist(), strict=True):
            assert abs(abs(decoded) - mean) <= mean * 2**-8 + 2.0**-133
            assert (decoded >= 0) == (value >= 0) or decoded == 0


def test_a_zero_becomes_plus_the_scale_unless_all_are_zero() -> None:
    values = torch.zeros(16)
    values[3] = -8.0
    out = round_trip(Sign(block=8), values)
    assert out[:8].tolist() == [1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    assert torch.count_nonzero(out[8:]) == 0


def test_the_rest_counts_its_own_values_only() -> None:
    assert round_trip(Sign(block=1024), torch.full((1027,), -2.0)).tolist() == [-2.0] * 1027


@pytest.mark.parametrize("count", [64, 1000, 4096])
def test_it_contracts(count: int) -> None:
    """Error feedback converges if the error is below the input: 1 - |x|_1^2 / (n |x|_2^2) of it (Lemma 8)."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    error = (round_trip(Sign(block=4096), values) - values).square().sum()
    share = 1 - values.abs().sum() ** 2 / (count * values.square().sum())
    assert error <= (share + 1e-4) * values.square().sum()


def test_mutant_one_scale_for_the_tensor_blows_up_small_blocks() -> None:
    values = torch.cat([torch.full((64,), 100.0), torch.full((64,), 0.01)])

    def small_block_survives(out: Tensor) -> bool:
        return bool(((out[64:] - 0.01).abs() < 0.001).all())

    assert small_block_survives(round_trip(Sign(block=64), values))
    assert not small_block_survives(round_trip(Sign(block=128), values))


def test_mutant_unscaled_or_peak_scaled_signs_do_not_contract() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(2))

    def contracts(out: Tensor) -> bool:
        return bool((out - values).norm() < 0.65 * values.norm())

    assert contracts(round_trip(Sign(), values))
    assert not contracts(values.sign() * values.abs().max())
