"""Casts against numbers rounded one at a time in exact arithmetic."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.link.codec.blocks import BFLOAT16_MAX
from photon.link.codec.cast import Bfloat16, Float16

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_bfloat16(value: float) -> float:
    """The bfloat16 nearest to a float32, the even one of two, never infinite; by trying the neighbours."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    below = bits & 0xFFFF0000
    around = [below, below + 0x10000]
    candidates = [struct.unpack("<f", struct.pack("<I", item))[0] for item in around if item & 0x7F800000 != 0x7F800000]
    distances = [abs(Fraction(value) - Fraction(item)) for item in candidates]
    if len(distances) == 2 and distances[0] == distances[1]:
        return float(candidates[0] if around[0] >> 16 & 1 == 0 else candidates[1])
    return float(candidates[distances.index(min(distances))])


def round_trip(stage: Bfloat16 | Float16, values: Tensor) -> Tensor:
    return stage.decode(stage.encode(values, 0), values.numel())


@settings(deadline=None)
@given(st.lists(finite, max_size=40))
def test_bfloat16_is_the_nearest(values: list[float]) -> None:
    out = round_trip(Bfloat16(), torch.tensor(values, dtype=torch.float32))
    assert out.tolist() == [nearest_bfloat16(value) for value in values]


def test_bfloat16_ties_go_to_even_and_nothing_becomes_infinite() -> None:
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x00008000, 0x00018000], dtype=torch.int32).view(torch.float32)
    largest = torch.finfo(torch.float32).max
    values = torch.cat([ties, -ties, torch.tensor([largest, -largest, BFLOAT16_MAX])])
    out = round_trip(Bfloat16(), values)
    assert out.tolist() == [nearest_bfloat16(value) for value in values.tolist()]
    assert out.abs().max() == BFLOAT16_MAX


def test_mutant_bfloat16_cut_off_is_biased() -> None:
    """Dropping the low 16 bits passes a tolerance test, but shrinks everything: 0.14% of every update."""
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) + 1.0

    def bias(out: Tensor) -> float:
        return float((out.double() - values.double()).mean())

    cut = (values.view(torch.int32) & -0x10000).view(torch.float32)
    # Errors are at most 2**-8 and about even over it: 6 standard deviations of their mean.
    bound = 6 * 2**-8 / math.sqrt(12 * len(values))
    assert abs(bias(round_trip(Bfloat16(), values))) < bound
    assert abs(bias(cut)) > bound


def reference_float16(values: Tensor, block: int) -> list[float]:
    out: list[float] = []
    for begin in range(0, len(values), block):
        largest = 32752.0 * 2.0**113
        part = [max(-largest, min(largest, float(value))) for value in values[begin : begin + block]]
        peak = max(abs(value) for value in part)
        exponent = max(-126, math.frexp(peak)[1] - 15) if peak else 0
        # Through float64, where the scaling is exact; numpy rounds to float16 with ties to even.
        out += [float(np.float16(value * 2.0**-exponent)) * 2.0**exponent for value in part]
    return out


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=40))
def test_float16_is_as_in_exact_arithmetic(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    stage = Float16(block=8)
    out = round_trip(stage, tensor)
    # Scaling by a power below one can leave numbers too small for float32; what is lost of them float16 loses anyway.
    expected = torch.tensor(reference_float16(tensor, 8), dtype=torch.float64)
    assert torch.equal(out, expected.float())


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-6, 1.0, 1e6, 1e37])
def test_float16_error_is_relative_at_any_scale(scale: float) -> None:
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(1)) * scale
    error = (round_trip(Float16(), values).double() - values.double()).abs()
    peak = float(values.abs().max())
    # 11 bits of mantissa, and below 2**-14 of float16's own a fixed step; the peak lies within [2**14, 2**15).
    assert (error <= values.double().abs() * 2**-11 + peak * 2**-14 * 2**-25).all()


def test_float16_powers_are_powers_of_two_at_the_front() -> None:
    values = torch.cat([torch.full((8,), 3.0), torch.zeros(8), torch.full((3,), 2.0**-149)])
    data = Float16(block=8).encode(values, 0)
    powers = struct.unpack("<3f", bytes(data[:12].tolist()))
    assert powers == (2.0**-13, 1.0, 2.0**-126)
    assert struct.unpack("<8e", bytes(data[12:28].tolist())) == (3.0 * 2**13,) * 8


def test_mutant_one_power_for_the_tensor_loses_small_blocks() -> None:
    values = torch.cat([torch.full((64,), 1e6), torch.full((64,), 1e-6)])

    def small_block_survives(out: Tensor) -> bool:
        return bool(((out[64:] - 1e-6).abs() <= 1e-6 * 2**-11).all())

    assert small_block_survives(round_trip(Float16(block=64), values))
    assert not small_block_survives(round_trip(Float16(block=128), values))
    assert not small_block_survives(values.half().float()), "a plain cast"
