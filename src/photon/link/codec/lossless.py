"""Fewer bytes, every bit kept: byte planes, then a general compressor.

The encoding is one method byte and then

    0 stored      the bytes as they were: what does not compress grows by the method byte alone
    1 compressed  u64 size | for each 2^18 items, for each byte of an item: u32 length | payload | rest

all little endian. A payload is a byte plane, that is the k-th bytes of so many items, compressed on its own: a
compressor that sees the end of one plane and the beginning of the next at once finds neither's pattern. One as long as
its plane is not compressed. The rest are the bytes behind the last whole item. Nothing guards against flipped bits
here: the hash of the whole body does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lz4.block
import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from photon.errors import WireError

Bytes = NDArray[np.uint8]

_STORED, _COMPRESSED = 0, 1
_PIECE_ITEMS = 2**18  # a plane then stays in the cache between its copy and its compression
_METHOD_BYTES, _SIZE_BYTES, _LENGTH_BYTES = 1, 8, 4
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Zstd:
    """Zstandard (RFC 8878) behind a byte shuffle."""

    level: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 22:
            raise ValueError(f"level must be between 1 and 22, got {self.level}")

    def encode(self, data: Tensor, item_bytes: int) -> Tensor:
        """uint8 [at most n + 1] of uint8 [n]."""
        compressor = zstandard.ZstdCompressor(level=self.level)
        if self.level == 1:
            # Numbers have no repeats worth finding, only uneven bytes: with next to no search for repeats it is twice
            # as fast on float planes, and a little smaller.
            parameters = zstandard.ZstdCompressionParameters.from_level(1, hash_log=8, min_match=7)
            compressor = zstandard.ZstdCompressor(compression_params=parameters)
        return _encode(data, item_bytes if self.shuffle else 1, lambda plane: compressor.compress(plane.data))

    def max_bytes(self, size: int) -> int:
        """One more than there were."""
        return size + _METHOD_BYTES

    def decode(self, data: Tensor, most: int, item_bytes: int) -> Tensor:
        """uint8 [n]. Raises WireError on anything malformed, and before allocating if n would exceed `most`."""
        decompressor = zstandard.ZstdDecompressor()

        def expand(payload: Bytes, size: int) -> bytes:
            # The library allocates what the frame declares, so it must be ours. Skippable frames pass for data there.
            if payload[:4].tobytes() != _ZSTD_MAGIC:
                raise WireError("a zstd payload does not begin with a zstd frame")
            declared = zstandard.get_frame_parameters(payload.data).content_size
            if declared != size:
                raise WireError(f"a zstd frame declares {declared} bytes, its plane has {size}")
            return decompressor.decompress(payload.data, allow_extra_data=False)

        return _decode(data, most, item_bytes if self.shuffle else 1, expand)


@dataclass(frozen=True)
class Lz4:
    """LZ4 blocks behind a byte shuffle: faster than Zstandard, but blind to uneven bytes without repeats."""

    shuffle: bool = True

    def encode(self, data: Tensor, item_bytes: int) -> Tensor:
        """uint8 [at most n + 1] of uint8 [n]."""
        return _encode(data, item_bytes if self.shuffle else 1, _lz4_compress)

    def max_bytes(self, size: int) -> int:
        """One more than there were."""
        return size + _METHOD_BYTES

    def decode(self, data: Tensor, most: int, item_bytes: int) -> Tensor:
        """uint8 [n]. Raises WireError on anything malformed, and before allocating if n would exceed `most`."""
        return _decode(data, most, item_bytes if self.shuffle else 1, _lz4_expand)


def _lz4_compress(plane: Bytes) -> bytes:
    compressed: bytes = lz4.block.compress(plane.data, store_size=False)
    return compressed


def _lz4_expand(payload: Bytes, size: int) -> bytes:
    try:
        expanded: bytes = lz4.block.decompress(payload.data, uncompressed_size=size)
    except lz4.block.LZ4BlockError as error:
        raise WireError(f"a plane is not an lz4 block: {error}") from None
    return expanded


def _encode(data: Tensor, item_bytes: int, compress: Callable[[Bytes], bytes]) -> Tensor:
    source: Bytes = data.contiguous().numpy()
    out = np.empty(source.size + _METHOD_BYTES, np.uint8)
    position = _compress_into(out, source, item_bytes, compress)
    if position is None:
        out[0] = _STORED
        out[_METHOD_BYTES:] = source
    return torch.from_numpy(out[:position])  # the rest of `out` was never touched, so never became memory


def _compress_into(out: Bytes, source: Bytes, item_bytes: int, compress: Callable[[Bytes], bytes]) -> int | None:
    """Bytes of the compressed form, written into `out` [n + 1]; None if it would not be shorter than that."""
    head = bytes([_COMPRESSED]) + source.size.to_bytes(_SIZE_BYTES, "little")
    if len(head) >= out.size:
        return None
    position = _append(out, 0, head)
    items = _items(source, item_bytes)
    scratch = np.empty(min(len(items), _PIECE_ITEMS), np.uint8)
    for start in range(0, len(items), _PIECE_ITEMS):
        piece = items[start : start + _PIECE_ITEMS]
        plane = scratch[: len(piece)]
        for k in range(item_bytes):
            plane[:] = piece[:, k]
            payload = compress(plane)
            if len(payload) >= plane.size:
                payload = plane.tobytes()
            if position + _LENGTH_BYTES + len(payload) >= out.size:
                return None
            position = _append(out, position, len(payload).to_bytes(_LENGTH_BYTES, "little"))
            position = _append(out, position, payload)
    rest = source[items.size :].tobytes()
    return None if position + len(rest) >= out.size else _append(out, position, rest)


def _items(data: Bytes, item_bytes: int) -> Bytes:
    """A view [items, item_bytes] of the whole items."""
    return data[: data.size // item_bytes * item_bytes].reshape(-1, item_bytes)


def _append(out: Bytes, position: int, data: bytes) -> int:
    out[position : position + len(data)] = np.frombuffer(data, np.uint8)
    return position + len(data)


def _decode(data: Tensor, most: int, item_bytes: int, expand: Callable[[Bytes, int], bytes]) -> Tensor:
    source: Bytes = data.contiguous().numpy()
    if not source.size or source[0] not in (_STORED, _COMPRESSED):
        raise WireError("compressed data begins with neither 0 (stored) nor 1 (compressed)")
    if source[0] == _STORED:
        if source.size - _METHOD_BYTES > most:
            raise WireError(f"{source.size - _METHOD_BYTES} stored bytes, {most} at most were expected")
        return data[_METHOD_BYTES:].clone()  # not a view: one byte off, it could not be read as wider numbers
    body = source[_METHOD_BYTES + _SIZE_BYTES :]
    size = int.from_bytes(source[_METHOD_BYTES : _METHOD_BYTES + _SIZE_BYTES].tobytes(), "little")
    planes = -(-(size // item_bytes) // _PIECE_ITEMS) * item_bytes
    # Behind the size there is a length for every plane: else a few bytes could make us allocate `most` for nothing.
    if not 0 < size <= most or planes * _LENGTH_BYTES > body.size:
        raise WireError(f"{source.size} compressed bytes declare {size}; between 1 and {most} were expected")
    out = np.empty(size, np.uint8)
    items = _items(out, item_bytes)
    position = 0
    for start in range(0, len(items), _PIECE_ITEMS):
        piece = items[start : start + _PIECE_ITEMS]
        for k in range(item_bytes):
            length = int.from_bytes(body[position : position + _LENGTH_BYTES].tobytes(), "little")
            position += _LENGTH_BYTES
            payload = body[position : position + length]
            if position > body.size or payload.size != length or length > len(piece):
                raise WireError(f"a plane of {len(piece)} bytes declares {length}; {payload.size} follow")
            position += length
            piece[:, k] = payload if length == len(piece) else _expand_plane(payload, len(piece), expand)
    rest = body[position:]
    if rest.size != size - items.size:
        raise WireError(f"{rest.size} bytes follow the last plane, expected {size - items.size}")
    out[items.size :] = rest
    return torch.from_numpy(out)


def _expand_plane(payload: Bytes, size: int, expand: Callable[[Bytes, int], bytes]) -> Bytes:
    try:
        plane = np.frombuffer(expand(payload, size), np.uint8)
    except zstandard.ZstdError as error:
        raise WireError(f"a plane is not a zstd frame: {error}") from None
    if plane.size != size:
        raise WireError(f"a plane expands to {plane.size} bytes, expected {size}")
    return plane
