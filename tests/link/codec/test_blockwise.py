"""Blockwise integers against a slow reader, their error laws, and the statistics of random rounding."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.link.codec.blockwise import Blockwise, Int2, Int4, Int8, _uniform

EVEN = [Int8(block=16), Int4(block=16), Int8(block=16, rounding="stochastic"), Int4(block=16, rounding="stochastic")]
KINDS: list[type[Int8] | type[Int4] | type[Int2]] = [Int8, Int4, Int2]
STOCHASTIC = [kind(block=128, rounding="stochastic") for kind in KINDS]
numbers = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=70)
small_numbers = st.lists(st.floats(-4, 4, width=32), max_size=70)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def laplace(count: int) -> Tensor:
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(7)).clamp_(1e-7, 1 - 1e-7) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def round_trip(stage: Blockwise, values: Tensor, seed: int = 0) -> Tensor:
    return stage.decode(stage.encode(values, seed), values.numel())


def relative_error(out: Tensor, values: Tensor) -> float:
    return float((out - values).norm() / values.norm())


def read(data: Tensor, count: int, stage: Blockwise) -> tuple[list[list[float]], list[float]]:
    """The stored scales of each block and the values of an encoding, byte by byte."""
    raw = bytes(data.tolist())
    per_block = 2 if stage.bits == 2 else 1
    stored = -(-count // stage.block) * per_block
    scales = [struct.unpack("<f", b"\0\0" + raw[2 * index : 2 * index + 2])[0] for index in range(stored)]
    blocks = [scales[begin : begin + per_block] for begin in range(0, stored, per_block)]
    codes, per_byte = raw[2 * stored :], 8 // stage.bits
    values = []
    for index in range(count):
        code = codes[index // per_byte] >> (stage.bits * (index % per_byte)) & ((1 << stage.bits) - 1)
        block = blocks[index // stage.block]
        if stage.bits == 2:
            values.append(-block[code & 1] if code & 2 else block[code & 1])
        else:
            values.append(float(torch.tensor(block[0]) * (code - (1 << (stage.bits - 1)))))
    return blocks, values


@pytest.mark.parametrize("stage", [*EVEN, Int2(block=16), Int2(block=16, rounding="stochastic")], ids=str)
@settings(deadline=None, max_examples=40)
@given(numbers)
def test_decoder_reads_what_the_layout_says(stage: Blockwise, numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    data = stage.encode(values, 3)
    assert stage.decode(data, len(numbers)).tolist() == read(data, len(numbers), stage)[1]


@pytest.mark.parametrize("stage", EVEN, ids=str)
@settings(deadline=None, max_examples=60)
@given(numbers | small_numbers)
def test_even_levels_err_by_half_a_step_or_one_if_random(stage: Blockwise, numbers: list[float]) -> None:
    data = stage.encode(torch.tensor(numbers, dtype=torch.float32), 3)
    blocks, out = read(data, len(numbers), stage)
    steps = 1 if stage.rounding == "stochastic" else 0.5
    for index, (value, decoded) in enumerate(zip(numbers, out, strict=True)):
        scale = abs(blocks[index // 16][0])
        assert abs(decoded - value) <= steps * scale * (1 + 1e-5)
        if value == 0:
            assert decoded == 0
    for index, block in enumerate(blocks):
        peak = max(abs(value) for value in numbers[16 * index : 16 * index + 16])
        # No wider than levels to plus and minus 2**(bits-1) - 1 would need, but for the rounding up to bfloat16.
        assert abs(block[0]) <= max(peak / (2 ** (stage.bits - 1) - 1) * (1 + 2**-7), 2.0**-126)


@settings(deadline=None, max_examples=60)
@given(numbers | small_numbers)
def test_two_bits_take_the_nearest_level(numbers: list[float]) -> None:
    stage = Int2(block=16)
    blocks, out = read(stage.encode(torch.tensor(numbers, dtype=torch.float32), 0), len(numbers), stage)
    for index, (value, decoded) in enumerate(zip(numbers, out, strict=True)):
        low, high = blocks[index // 16]
        nearest = min(abs(value - level) for level in (-high, -low, low, high))
        assert abs(value - decoded) <= nearest * (1 + 1e-6) + 2.0**-148
        assert 0 <= low <= high


def test_two_bits_fit_better_than_evenly_spaced_or_zero_levels() -> None:
    """At the same bits: one scale per 64 values, fitted by trying 200, against two magnitudes per 128."""
    largest = normal(2**18).view(-1, 4096)
    chosen = largest.gather(1, largest.abs().topk(82, dim=1).indices.sort(1).values).reshape(-1)[: 64 * 80]
    bounds = {"laplace": (laplace(2**14), 0.98), "largest 2%": (chosen, 0.6), "normal": (normal(2**14), 1.02)}
    for name, (values, bound) in bounds.items():
        rows = values.view(-1, 64)
        best = {levels: torch.full((len(rows), 1), math.inf) for levels in [(0.5, 1.5), (0.0, 1.0)]}
        for step in torch.linspace(0.05, 4, 200):
            scale = step * rows.abs().mean(1, keepdim=True)
            for levels, errors in best.items():
                choices = [(rows.abs() - level * scale).square() for level in levels]
                now = torch.minimum(*choices).sum(1, keepdim=True)
                best[levels] = torch.minimum(errors, now)
        ours = relative_error(round_trip(Int2(), values), values)
        for errors in best.values():
            assert ours < bound * float((errors.sum() / values.square().sum()).sqrt()), name


def test_measured_errors_are_as_documented() -> None:
    for stage, on_normal, on_laplace in [(Int8(), 0.0065, 0.009), (Int4(), 0.097, 0.125), (Int2(), 0.339, 0.415)]:
        for values, expected in [(normal(2**17), on_normal), (laplace(2**17), on_laplace)]:
            assert relative_error(round_trip(stage, values), values) == pytest.approx(expected, rel=0.03)


def test_the_side_with_the_larger_value_gets_the_extra_level() -> None:
    for sign in (1.0, -1.0):
        values = sign * torch.tensor([8.0, -7.0, 3.0, 0.0, 1.0, -1.0, 2.0, -6.0])
        assert torch.equal(round_trip(Int4(block=8), values), values)


def test_one_magnitude_is_kept_exactly() -> None:
    for magnitude in (1.0, 2.0**-120, 2.0**100):
        values = torch.tensor([magnitude, -magnitude] * 20)
        assert torch.equal(round_trip(Int2(block=16), values), values)
        assert torch.equal(round_trip(Int2(block=16, rounding="stochastic"), values), values)


def test_mutant_scale_per_tensor() -> None:
    """A spike must coarsen its own block only."""
    for kind in KINDS:
        values = normal(1024)
        values[5] = 1e4

        def other_blocks_keep_their_error(out: Tensor, bits: int, values: Tensor = values) -> bool:
            return relative_error(out[128:], values[128:]) < {8: 0.01, 4: 0.2, 2: 0.4}[bits]

        assert other_blocks_keep_their_error(round_trip(kind(block=128), values), kind().bits)
        assert not other_blocks_keep_their_error(round_trip(kind(block=1024), values), kind().bits)


def test_mutant_rounding_toward_zero() -> None:
    """Cutting off keeps every value within a step, but shrinks the sum of them all."""
    for stage in (Int8(), Int4()):
        values = torch.rand(2**16, generator=torch.Generator().manual_seed(1)) + 1.0
        scale = 2.0 / (2 ** (stage.bits - 1) - 1)
        # The error is about even over a step: 6 standard deviations of its mean, and what the last step's end adds.
        bound = 6 * scale / math.sqrt(12 * len(values)) + 0.005 * scale

        def is_unbiased(out: Tensor, values: Tensor = values, bound: float = bound) -> bool:
            return abs(float((out.double() - values.double()).mean())) < bound

        assert is_unbiased(round_trip(stage, values))
        assert not is_unbiased((values / scale).trunc() * scale)


# A block with everything in it: zeros, a spike, values of a millionth of it, values on levels, and normal ones.
BLOCK = torch.cat(
    [torch.tensor([0.0, 0.0, 6.0, -6.0, 1e-6, -1e-6, 3.0, -1.5, 0.75, 0.01, -0.01]), torch.full((20,), 0.3), normal(97)]
)


def levels_of(stage: Blockwise, data: Tensor) -> Tensor:
    """The levels of an encoding of BLOCK, in order."""
    (scales,), _ = read(data, 128, stage)
    if stage.bits == 2:
        return torch.tensor(sorted([*scales, *(-scale for scale in scales)]), dtype=torch.float64)
    half = 1 << (stage.bits - 1)
    return torch.tensor(sorted(scales[0] * code for code in range(-half, half)), dtype=torch.float64)


def worst_z(encode: Callable[[Tensor, int], Tensor], stage: Blockwise) -> float:
    """How many standard errors the mean of 16 * 512 decodings of BLOCK is from it, at the worst of its values."""
    outs = [stage.decode(encode(BLOCK.repeat(512), seed), 512 * 128).view(512, 128).double() for seed in range(16)]
    out = torch.cat(outs)
    levels = levels_of(stage, encode(BLOCK, 0))
    value = BLOCK.double()
    upper = torch.searchsorted(levels, value).clamp(max=len(levels) - 1)
    on_level = levels[upper] == value
    low, high = levels[(upper - 1).clamp(min=0)], levels[upper]
    # A value goes to one of its two neighbours, up with the probability that makes the mean right.
    variance = torch.where(on_level, 0.0, (value - low) * (high - value)).clamp(min=0)
    error = (out.mean(0) - value).abs()
    if bool((error[variance == 0] > 1e-5).any()):
        return math.inf
    # 1e-6: what float32 and the last of 23 random bits take away. Values that hardly ever move up have few events:
    # one more of them than expected is no surprise.
    noise = (variance / len(out)).sqrt() + (high - low) / len(out)
    return float(((error - 1e-6).clamp(min=0) / noise.clamp(min=1e-12)).max())


@pytest.mark.parametrize("stage", STOCHASTIC, ids=str)
def test_stochastic_rounding_is_unbiased(stage: Blockwise) -> None:
    # 128 values: beyond 5.5 standard errors by chance once in 200,000 times. The seeds are fixed.
    assert worst_z(stage.encode, stage) < 5.5


@pytest.mark.parametrize("kind", KINDS)
def test_mutant_nearest_is_not_unbiased(kind: type[Int8]) -> None:
    stage = kind(block=128)
    assert worst_z(stage.encode, stage) > 5.5


@pytest.mark.parametrize("kind", KINDS)
def test_mutant_one_random_number_for_all(kind: type[Int8], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value alone would still be unbiased; but the errors of 8192 equal values must not all be the same one."""
    stage = kind(block=128, rounding="stochastic")
    values = torch.full((2**13,), 0.4)
    values[::128] = 1.7  # the levels are not at 0.4

    def errors_cancel() -> bool:
        off = [(round_trip(stage, values, seed) - values).double() for seed in range(20)]
        spread = torch.stack([error.pow(2).sum() for error in off]).mean().sqrt()
        # Independent errors add up like a random walk: their sum is within 5 of its standard deviations.
        return all(abs(float(error.sum())) < 5 * float(spread) for error in off)

    assert errors_cancel()
    monkeypatch.setattr(
        "photon.link.codec.blockwise._uniform",
        lambda source, out: out.fill_(float(source.random_raw(1)[0]) / 2**64),
    )
    assert not errors_cancel()


def test_seeds_decide() -> None:
    for stage in STOCHASTIC:
        values = normal(5000)
        assert torch.equal(stage.encode(values, 2**63 - 1), stage.encode(values, 2**63 - 1))
        assert not torch.equal(stage.encode(values, 1), stage.encode(values, 2))
    for kind in KINDS:
        assert torch.equal(kind().encode(normal(5000), 1), kind().encode(normal(5000), 2))


def test_random_numbers_are_even() -> None:
    out = _uniform(np.random.SFC64(3), torch.empty(2**16 + 1))
    assert 0 <= out.min() < 1e-3
    assert 1 - 1e-3 < out.max() < 1
    counts = torch.histc(out, 64, 0, 1)
    expected = len(out) / 64
    # Chi-squared of 63 degrees: mean 63, standard deviation 11.2; five of them.
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * 11.3


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="bits is 3: it must be 8, 4 or 2"):
        Blockwise(bits=3)
    with pytest.raises(ValueError, match="rounding is 'up': it must be 'nearest' or 'stochastic'"):
        Int4(rounding="up")  # type: ignore[arg-type]  # what the test is about


def test_the_names_are_the_general_stage() -> None:
    values = normal(1000)
    for named, general in [
        (Int8(), Blockwise(8, 128)),
        (Int4(32, "stochastic"), Blockwise(4, 32, "stochastic")),
        (Int2(), Blockwise(2, 128)),
    ]:
        assert torch.equal(named.encode(values, 4), general.encode(values, 4))
