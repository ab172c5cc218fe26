"""Integers of 8, 4 and 2 bits with scales per block.

Each block of values carries its own scales in bfloat16, so that one large value coarsens its own block only. Layout of
an encoding: the scales of all blocks, then the codes, 8 / bits of them a byte, the first in the lowest bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from photon.link.codec.blocks import (
    BFLOAT16_MAX,
    block_count,
    check_block,
    flat_values,
    magnitude_sum,
    pack,
    pieces,
    received,
    rounded_up,
    unpack,
    work_values,
)

Rounding = Literal["nearest", "stochastic"]
_SCALE_BYTES = 2
_BITS = (8, 4, 2)
# No scale is smaller: then a product with it is a normal number or zero, even where a machine flushes others to zero.
_SMALLEST_SCALE = 2.0**-126
# How often two-bit magnitudes are fitted; a fourth time gains less than 1% of error on normal values.
_FITS = 3
# Of the mean magnitude: where the smaller level of stochastic two-bit values is. Within 4% of the best for each block
# on normal and Laplace values, and far from the best only where all magnitudes are nearly equal.
_STOCHASTIC_LOW = 0.8


@dataclass(frozen=True)
class Blockwise:
    """`bits` (8, 4 or 2) a value and bfloat16 scales per `block` values; each value to the nearest level, or at random.

    `stochastic` rounds up or down so that the expected result is the value itself (Alistarh et al. 2017, QSGD,
    1610.02132), at 1.4 (8 and 4 bits) or 2.1 times (2 bits) the error of `nearest`.

    8 and 4 bits: evenly spaced levels from -2**(bits-1) to 2**(bits-1) - 1 times one scale, zero among them. The scale
    is the smallest that covers the block, and negative where that puts the larger side on the longer one: at 4 bits
    10% less error than levels from -7 to 7 on normal values, 11% on Laplace ones, and nothing is ever clipped.

    2 bits: plus and minus two magnitudes, both stored; no level at zero, so in a block that is not all zero a zero
    moves to the smaller magnitude. Relative L2 errors of what was tried, on (normal, Laplace, largest 2% of normal)
    values at 2.25 bits each: levels -1, 0, 1: (.43, .52, .12); magnitudes 0.5 and 1.5 of one fitted scale, block 64:
    (.34, .43, .12); two free magnitudes, block 128: (.34, .41, .07).
    """

    bits: int = 8
    block: int = 128
    rounding: Rounding = "nearest"
    item_bytes = 1

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ValueError(f"bits is {self.bits}: it must be 8, 4 or 2")
        check_block(self.block)
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding is {self.rounding!r}: it must be 'nearest' or 'stochastic'")

    def encode(self, values: Tensor, seed: int) -> Tensor:
        """uint8 [encoded_bytes(n)] of float32 [n]; the same values and seed always give the same bytes."""
        values = flat_values(values)
        count = values.numel()
        out = torch.empty(self.encoded_bytes(count), dtype=torch.uint8)
        scales, packed = self._split(out, count)
        size = work_values(count, self.block)
        work = _Work(*(torch.empty(size, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.uint8)))
        # numpy's generator: three times as fast as torch's, and its numbers stay the same from release to release.
        source = np.random.SFC64(seed) if self.rounding == "stochastic" else None
        for piece in pieces(count, self.block):
            rows = piece.rows(values)
            work_here = work.cut(rows.shape)
            random = None if source is None else _uniform(source, work_here.second)
            if self.bits == 2:
                in_row = min(self.block, piece.end - piece.begin)
                scales_here, codes = _two_magnitudes(rows, in_row, random, work_here)
            else:
                scales_here, codes = _even_levels(rows, self.bits, random, work_here)
            scales[piece.first : piece.last] = scales_here
            begin, end = self._bytes_of(piece.begin), self._bytes_of(piece.end)
            packed[begin:end] = pack(codes.view(-1), self.bits)[: end - begin]
        return out

    def encoded_bytes(self, count: int) -> int:
        """`bits` a value, rounded up to a byte, and two bytes for each scale of a block: one, with 2 bits two."""
        return self._bytes_of(count) + _SCALE_BYTES * self._scales_per_block * block_count(count, self.block)

    def decode(self, data: Tensor, count: int) -> Tensor:
        """float32 [count]. Raises WireError if there are more or fewer bytes."""
        stored, packed = self._split(received(data, count, self.encoded_bytes(count)), count)
        scales = stored.float()
        out = torch.empty(count, dtype=torch.float32)
        for piece in pieces(count, self.block):
            begin, end = self._bytes_of(piece.begin), self._bytes_of(piece.end)
            codes = unpack(packed[begin:end], self.bits)[: piece.end - piece.begin]
            rows = out[piece.begin : piece.end].view(piece.last - piece.first, -1)
            scales_here = scales[piece.first : piece.last]
            if self.bits == 2:
                _decode_magnitudes(codes.view_as(rows), scales_here, rows)
            else:
                _decode_levels(codes.view_as(rows), self.bits, scales_here, rows)
        return out

    @property
    def _scales_per_block(self) -> int:
        return 2 if self.bits == 2 else 1

    def _bytes_of(self, values: int) -> int:
        return -(-values * self.bits // 8)

    def _split(self, data: Tensor, count: int) -> tuple[Tensor, Tensor]:
        end = self.encoded_bytes(count) - self._bytes_of(count)
        return data[:end].view(torch.bfloat16).view(-1, self._scales_per_block), data[end:]


@dataclass(frozen=True)
class Int8(Blockwise):
    """`Blockwise` with 8 bits: 8.125 a value."""

    bits: int = field(default=8, init=False)


@dataclass(frozen=True)
class Int4(Blockwise):
    """`Blockwise` with 4 bits: 4.25 a value."""

    bits: int = field(default=4, init=False)
    block: int = 64


@dataclass(frozen=True)
class Int2(Blockwise):
    """`Blockwise` with 2 bits: 2.25 a value."""

    bits: int = field(default=2, init=False)


@dataclass(frozen=True)
class _Work:
    """Memory for the work on one piece: two float32 and one uint8 of its size."""

    first: Tensor
    second: Tensor
    codes: Tensor

    def cut(self, shape: torch.Size) -> _Work:
        """The part that a piece of that shape needs."""
        size = shape.numel()
        return _Work(*(tensor[:size].view(shape) for tensor in (self.first, self.second, self.codes)))


def _uniform(source: np.random.SFC64, out: Tensor) -> Tensor:
    """Fill `out` with multiples of 2**-23 from [0, 1), all equally likely, and return it."""
    count = out.numel()
    bits = source.random_raw(-(-count // 2)).view(np.uint32)[:count]
    bits >>= 9
    bits |= 0x3F800000  # the exponent of [1, 2)
    return torch.sub(torch.from_numpy(bits.view(np.float32)).view_as(out), 1.0, out=out)


def _even_levels(rows: Tensor, bits: int, random: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
    """Scales float32 [blocks, 1] and codes uint8 [blocks, width], offset so that all are positive."""
    half = 1 << (bits - 1)
    above = rows.amax(1, keepdim=True).clamp_(min=0)
    below = rows.amin(1, keepdim=True).clamp_(max=0).neg_()
    upright = torch.maximum(above / (half - 1), below / half)
    reverse = torch.maximum(below / (half - 1), above / half)
    # Rounded up, for the largest value to stay within the levels; but no level may be infinite.
    sizes = rounded_up(torch.minimum(upright, reverse).clamp_(min=_SMALLEST_SCALE)).clamp_(max=BFLOAT16_MAX / half)
    scales = torch.where(upright <= reverse, sizes, -sizes)
    levels = torch.div(rows, scales, out=work.first)
    if random is None:
        levels.round_()
    else:
        levels.add_(random).floor_()
    codes = work.codes.view(torch.int8).copy_(levels.clamp_(-half, half - 1))
    return scales, codes.view(torch.uint8).bitwise_xor_(half).bitwise_and_(2 * half - 1)


def _decode_levels(codes: Tensor, bits: int, scales: Tensor, out: Tensor) -> None:
    half = 1 << (bits - 1)
    signed = (codes ^ 128).view(torch.int8) if bits == 8 else codes.view(torch.int8) - half
    out.copy_(signed)
    out.mul_(scales)


def _two_magnitudes(rows: Tensor, in_row: int, random: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
    """Magnitudes float32 [blocks, 2] and codes uint8 [blocks, width]: bit 0 the larger magnitude, bit 1 minus.

    `in_row` of each row are values, the rest zeros that do not count.
    """
    magnitudes = torch.abs(rows, out=work.first)
    if random is None:
        low, high = _fitted(magnitudes, in_row, work.second)
        is_high = magnitudes >= low / 2 + high / 2
        is_negative = rows < 0
    else:
        high = rounded_up(magnitudes.amax(1, keepdim=True)).clamp_(max=BFLOAT16_MAX)
        low = _as_bfloat16(_STOCHASTIC_LOW * (magnitude_sum(magnitudes) / in_row).float())
        # Of the two choices one is certain: above `low` the sign is, below it the magnitude.
        is_high = magnitudes.sub_(low) > random * (high - low)
        is_negative = rows < random.mul_(-2).add_(1).mul_(low)
    codes = torch.bitwise_left_shift(is_negative.view(torch.uint8), 1, out=work.codes)
    return torch.cat((low, high), 1), codes.bitwise_or_(is_high.view(torch.uint8))


def _fitted(magnitudes: Tensor, in_row: int, work: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm (1982) per block: a value goes to the nearer magnitude, a magnitude to its values' mean."""
    total, padding = magnitude_sum(magnitudes), magnitudes.shape[1] - in_row
    low = high = threshold = (total / in_row).float()
    for _ in range(_FITS):
        torch.lt(magnitudes, threshold, out=work)
        low_count = work.sum(1, keepdim=True).sub_(padding)
        low_sum = magnitude_sum(work.mul_(magnitudes))
        high_count = in_row - low_count
        low = torch.where(low_count > 0, low_sum / low_count, low).float()
        high = torch.where(high_count > 0, (total - low_sum) / high_count, high).float()
        threshold = low / 2 + high / 2
    return _as_bfloat16(low), _as_bfloat16(high)


def _decode_magnitudes(codes: Tensor, magnitudes: Tensor, out: Tensor) -> None:
    """All on the bits, so that every level comes out exactly as it is stored."""
    low, high = magnitudes.view(torch.int32).unsqueeze(2).unbind(1)
    bits = out.view(torch.int32)
    bits.copy_(codes & 1).neg_().bitwise_and_(low ^ high).bitwise_xor_(low)
    bits.bitwise_xor_((codes & 2).to(torch.int32).bitwise_left_shift_(30))


def _as_bfloat16(magnitudes: Tensor) -> Tensor:
    return magnitudes.clamp_(max=BFLOAT16_MAX).to(torch.bfloat16).float()
