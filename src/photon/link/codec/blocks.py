"""A vector cut into blocks that share a scale: what the quantisers have in common.

Blocks are worked on some 2**18 values at a time, so that all passes over a piece but the first find it in the cache:
that makes torch two to three times as fast on large tensors. Everything is little endian, like the rest of the wire.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.errors import WireError

BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
MAX_BLOCK = 2**20
_PIECE_VALUES = 2**18
# A block's codes of 1, 2, 4 or 8 bits then fill whole bytes.
_BLOCK_STEP = 8


@dataclass(frozen=True)
class Piece:
    """Values [begin, end), a rectangle of `last - first` blocks of `width` values; only a rest is narrower, one row.

    The width of a rest is rounded up to a multiple of 8, for its codes to fill whole bytes.
    """

    begin: int
    end: int
    first: int
    last: int
    width: int

    @property
    def values(self) -> int:
        """Values of the rectangle; more than `end - begin` by up to 7 in a rest."""
        return (self.last - self.first) * self.width

    def rows(self, values: Tensor) -> Tensor:
        """The piece of contiguous `values` [n] as [blocks, width]: a view; of a rest a copy with zeros behind it."""
        part = values[self.begin : self.end]
        if part.numel() < self.values:
            part = torch.nn.functional.pad(part, (0, self.values - part.numel()))
        return part.view(-1, self.width)


def pieces(count: int, block: int) -> Iterator[Piece]:
    """Pieces of whole blocks that fit the cache, then the rest."""
    whole = count // block
    step = max(1, _PIECE_VALUES // block)
    for first in range(0, whole, step):
        last = min(whole, first + step)
        yield Piece(first * block, last * block, first, last, block)
    if count % block:
        yield Piece(whole * block, count, whole, whole + 1, _up(count % block, _BLOCK_STEP))


def work_values(count: int, block: int) -> int:
    """Values of the largest piece: how long a buffer for the work on one must be."""
    return min(max(block, _PIECE_VALUES // block * block), _up(count, _BLOCK_STEP))


def block_count(count: int, block: int) -> int:
    """Blocks of so many values; the last may be shorter."""
    return -(-count // block)


def check_block(block: int) -> None:
    """Raises ValueError unless `block` is a length that stages can work with."""
    if not _BLOCK_STEP <= block <= MAX_BLOCK or block % _BLOCK_STEP:
        raise ValueError(f"block is {block}: it must be a multiple of {_BLOCK_STEP} from {_BLOCK_STEP} to {MAX_BLOCK}")


def flat_values(values: Tensor) -> Tensor:
    """float32 [n], contiguous. Raises ValueError on another dtype."""
    if values.dtype != torch.float32:
        raise ValueError(f"values are {values.dtype}: only float32 can be quantised")
    return values.detach().contiguous().view(-1)


def received(data: Tensor, count: int, expected_bytes: int) -> Tensor:
    """The received bytes, contiguous and aligned for views as wider items. Raises WireError if they are not as many."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise WireError(f"encoded values are {data.dtype} in {data.dim()} dimensions, expected uint8 in one")
    if count < 0 or data.numel() != expected_bytes:
        raise WireError(f"{count} encoded values in {data.numel()} bytes, expected {max(0, expected_bytes)}")
    data = data.contiguous()
    # Cut out of a received buffer the bytes can begin anywhere.
    return data.clone() if data.data_ptr() % 4 or data.storage_offset() % 4 else data


def rounded_up(scales: Tensor) -> Tensor:
    """The smallest bfloat16 that are not below non-negative float32 `scales`, as float32."""
    return ((scales.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def magnitude_sum(magnitudes: Tensor) -> Tensor:
    """float64 [blocks, 1]: sums of non-negative [blocks, width]; finite even for 2**20 values of 1e38."""
    return magnitudes.sum(1, keepdim=True, dtype=torch.float64)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n * bits / 8] of codes uint8 [n] below 2**bits; the first code takes the lowest bits of a byte."""
    if bits == 4:
        pairs = codes.view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
    if bits == 2:
        fours = codes.view(torch.int32)
        return (fours | (fours >> 6) | (fours >> 12) | (fours >> 18)).to(torch.uint8)
    return codes


def unpack(data: Tensor, bits: int) -> Tensor:
    """The codes uint8 [n * 8 / bits] of packed uint8 [n]."""
    if bits == 4:
        pairs = data.to(torch.int16)
        return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)
    if bits == 2:
        fours = data.to(torch.int32)
        return ((fours | (fours << 6) | (fours << 12) | (fours << 18)) & 0x03030303).view(torch.uint8)
    return data


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
