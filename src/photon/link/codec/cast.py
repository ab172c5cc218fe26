"""Casts to 16 bits: bfloat16 keeps float32's range, float16 eight times its precision within a block's range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from photon.link.codec.blocks import (
    BFLOAT16_MAX,
    block_count,
    check_block,
    flat_values,
    pieces,
    received,
    work_values,
)

_ITEM_BYTES = 2
_SCALE_BYTES = 4
_PIECE = 2**18
# float16 ends at 65504; the largest magnitude of a block comes to lie in [2**14, 2**15).
_TOP_EXPONENT = 15
# Larger values would be rounded to 2**15, which times the largest power is infinite.
_LARGEST = 32752.0 * 2.0**113
_EXPONENT_BIAS = 127
_MANTISSA_BITS = 23
_LOWEST_EXPONENT = -126


@dataclass(frozen=True)
class Bfloat16:
    """float32 rounded to bfloat16, to nearest with ties to even; what would become infinite stays at the largest."""

    item_bytes = _ITEM_BYTES

    def encode(self, values: Tensor, seed: int) -> Tensor:
        """uint8 [2n] of float32 [n]; `seed` is not used."""
        del seed
        values = flat_values(values)
        out = torch.empty(self.encoded_bytes(values.numel()), dtype=torch.uint8)
        halves = out.view(torch.bfloat16)
        for begin in range(0, values.numel(), _PIECE):
            part = halves[begin : begin + _PIECE]
            part.copy_(values[begin : begin + _PIECE])
            part.clamp_(-BFLOAT16_MAX, BFLOAT16_MAX)
        return out

    def encoded_bytes(self, count: int) -> int:
        """Two a value."""
        return _ITEM_BYTES * count

    def decode(self, data: Tensor, count: int) -> Tensor:
        """float32 [count], exactly the bfloat16 values. Raises WireError if there are more or fewer bytes."""
        return received(data, count, self.encoded_bytes(count)).view(torch.bfloat16).to(torch.float32)


@dataclass(frozen=True)
class Float16:
    """float32 as float16 times a power of two per `block` values, which brings the largest of them just below 2**15.

    A pseudo-gradient of 1e-6 would otherwise lose its digits. The powers (float32 [blocks]) first, then the values.
    """

    block: int = 2**16
    item_bytes = _ITEM_BYTES

    def __post_init__(self) -> None:
        check_block(self.block)

    def encode(self, values: Tensor, seed: int) -> Tensor:
        """uint8 [4 * blocks + 2n] of float32 [n]; `seed` is not used."""
        del seed
        values = flat_values(values)
        count = values.numel()
        out = torch.empty(self.encoded_bytes(count), dtype=torch.uint8)
        powers, halves = self._split(out, count)
        work = torch.empty(work_values(count, self.block), dtype=torch.float32)
        for piece in pieces(count, self.block):
            rows = piece.rows(values)
            power, inverse = _powers(rows)
            powers[piece.first : piece.last] = power
            scaled = work[: piece.values]
            torch.clamp(rows, -_LARGEST, _LARGEST, out=scaled.view_as(rows)).mul_(inverse)
            halves[piece.begin : piece.end] = scaled[: piece.end - piece.begin]
        return out

    def encoded_bytes(self, count: int) -> int:
        """Two a value and four a block."""
        return _ITEM_BYTES * count + _SCALE_BYTES * block_count(count, self.block)

    def decode(self, data: Tensor, count: int) -> Tensor:
        """float32 [count]. Raises WireError if there are more or fewer bytes."""
        powers, halves = self._split(received(data, count, self.encoded_bytes(count)), count)
        out = torch.empty(count, dtype=torch.float32)
        for piece in pieces(count, self.block):
            part = out[piece.begin : piece.end]
            part.copy_(halves[piece.begin : piece.end])
            part.view(piece.last - piece.first, -1).mul_(powers[piece.first : piece.last])
        return out

    def _split(self, data: Tensor, count: int) -> tuple[Tensor, Tensor]:
        end = _SCALE_BYTES * block_count(count, self.block)
        return data[:end].view(torch.float32).view(-1, 1), data[end:].view(torch.float16)


def _powers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The power of two by which each row [blocks, width] is divided, and its inverse: float32 [blocks, 1] each."""
    peaks = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))
    exponents = torch.frexp(peaks).exponent - _TOP_EXPONENT
    # Below, the inverse would not be a float32; float16's own small numbers take over.
    exponents = exponents.clamp_(min=_LOWEST_EXPONENT).masked_fill_(peaks == 0, 0)
    return _power_of_two(exponents), _power_of_two(-exponents)


def _power_of_two(exponents: Tensor) -> Tensor:
    # Put together from its bits: pow() need not be exact.
    return ((exponents + _EXPONENT_BIAS) << _MANTISSA_BITS).view(torch.float32)
