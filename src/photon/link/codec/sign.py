"""One bit a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon.link.codec.blocks import (
    BFLOAT16_MAX,
    block_count,
    check_block,
    flat_values,
    magnitude_sum,
    pieces,
    received,
    work_values,
)

_SCALE_BYTES = 2


@dataclass(frozen=True)
class Sign:
    """The sign of every value times its block's mean magnitude: scaled sign of Karimireddy et al. 2019 (1901.09847).

    Biased, so it needs error feedback. A zero becomes plus the scale, except in a block of zeros, which stays zero.
    Scales (bfloat16 [blocks]) first, then a bit a value, set for negative ones.
    """

    block: int = 1024
    item_bytes = 1

    def __post_init__(self) -> None:
        check_block(self.block)

    def encode(self, values: Tensor, seed: int) -> Tensor:
        """uint8 [2 * blocks + n/8 rounded up] of float32 [n]; `seed` is not used."""
        del seed
        values = flat_values(values)
        count = values.numel()
        out = torch.empty(self.encoded_bytes(count), dtype=torch.uint8)
        end = _SCALE_BYTES * block_count(count, self.block)
        scales, bits = out[:end].view(torch.bfloat16), out[end:].numpy()
        size = work_values(count, self.block)
        work, negative = torch.empty(size, dtype=torch.float32), torch.empty(size, dtype=torch.bool)
        for piece in pieces(count, self.block):
            rows = piece.rows(values)
            magnitudes = torch.abs(rows, out=work[: piece.values].view_as(rows))
            in_row = min(self.block, piece.end - piece.begin)
            means = (magnitude_sum(magnitudes) / in_row).float().clamp_(max=BFLOAT16_MAX)
            scales[piece.first : piece.last] = means.view(-1)
            flags = torch.lt(rows, 0, out=negative[: piece.values].view_as(rows))
            packed = np.packbits(flags.numpy(), bitorder="little")
            bits[piece.begin // 8 : piece.begin // 8 + packed.size] = packed
        return out

    def encoded_bytes(self, count: int) -> int:
        """A bit a value, rounded up, and two bytes a block."""
        return -(-count // 8) + _SCALE_BYTES * block_count(count, self.block)

    def decode(self, data: Tensor, count: int) -> Tensor:
        """float32 [count]. Raises WireError if there are more or fewer bytes."""
        data = received(data, count, self.encoded_bytes(count))
        end = _SCALE_BYTES * block_count(count, self.block)
        scales, bits = data[:end].view(torch.bfloat16).float(), data[end:].numpy()
        out = torch.empty(count, dtype=torch.float32)
        for piece in pieces(count, self.block):
            size = piece.end - piece.begin
            begin = piece.begin // 8
            flags = np.unpackbits(bits[begin : begin + -(-size // 8)], count=size, bitorder="little")
            signs = torch.from_numpy(flags).view(torch.int8).mul_(-2).add_(1)
            part = out[piece.begin : piece.end]
            part.copy_(signs)
            part.view(piece.last - piece.first, -1).mul_(scales[piece.first : piece.last].unsqueeze(1))
        return out
