"""Which of a tensor's values are kept, in few bytes.

Two codings. `encode_indices` takes any set of places of a tensor and picks the smallest of three forms, named by a tag:

    bitmap   tag 0 | one bit a place
    packed   tag 1 | count (4 bytes, little endian) | every index at ceil(log2 n) bits
    delta    tag 2 | count (4 bytes, little endian) | a width for every 32 gaps (1 byte) | the gaps at those widths

A gap is how many places lie between an index and the one before it, or the beginning. `encode_chunk_indices` takes as
many places of every chunk as a `Chunks` says; its bytes follow from that alone, and need neither tag nor count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from photon.errors import WireError
from photon.link.codec.packing import MAX_WIDTH_BITS, pack, packed_bytes, unpack

BITMAP, PACKED, DELTA = 0, 1, 2
GROUP = 32  # of 16 to 256 gaps a width, 16 and 32 are smallest for random indices at densities of 0.3-10% (by 3-5%)
MAX_LENGTH = 2**32 - 1
_COUNT_BYTES = 4
_HEADER_BYTES = 1 + _COUNT_BYTES
_BLOCK_GROUPS = 2**11
_BLOCK_BYTES = 2**15

Indices = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def index_width(length: int) -> int:
    """Bits that tell `length` places apart: ceil(log2(length)), and 0 where there is no choice."""
    return max(0, length - 1).bit_length()


def max_index_bytes(length: int, count: int) -> int:
    """The most bytes that `encode_indices` makes of at most `count` of `length` places."""
    return 1 + min(_bitmap_bytes(length), _COUNT_BYTES + packed_bytes(min(count, length), index_width(length)))


def encode_indices(indices: Indices, length: int) -> Bytes:
    """The smallest coding of strictly ascending int64 [n] from 0 to `length` - 1; of equals, the lower tag.

    Raises ValueError if `length` is beyond 2**32 - 1.
    """
    if length > MAX_LENGTH:
        raise ValueError(f"a tensor of {length} values is too large to be made sparse: {MAX_LENGTH} at most")
    count = len(indices)
    gaps = np.diff(indices, prepend=-1) - 1
    widths = _group_widths(gaps)
    sizes = (
        1 + _bitmap_bytes(length),
        _HEADER_BYTES + packed_bytes(count, index_width(length)),
        _HEADER_BYTES + len(widths) + int(_group_ends(widths, count)[-1]),
    )
    tag = sizes.index(min(sizes))
    if tag == BITMAP:
        mask = np.zeros(length, dtype=np.bool_)
        mask[indices] = True
        return _joined(tag, b"", np.packbits(mask, bitorder="little"))
    head = count.to_bytes(_COUNT_BYTES, "little")
    if tag == PACKED:
        return _joined(tag, head, pack(indices.astype(np.uint32), index_width(length)))
    return _joined(tag, head, widths, _pack_gaps(gaps.astype(np.uint32), widths))


def index_count(data: Bytes, length: int) -> int:
    """How many indices these bytes hold. Raises WireError if they cannot be an encoding of places of `length`."""
    tag = int(data[0]) if len(data) else -1
    if tag == BITMAP:
        return _bitmap_count(data[1:], length)
    if tag not in (PACKED, DELTA) or len(data) < _HEADER_BYTES:
        raise WireError(f"{len(data)} bytes with tag {tag} are no indices")
    count = int.from_bytes(data[1:_HEADER_BYTES].tobytes(), "little")
    if count > length:
        raise WireError(f"{count} indices are declared of a tensor of {length} values")
    rest = len(data) - _HEADER_BYTES
    if tag == PACKED:
        expected = packed_bytes(count, index_width(length))
    else:
        widths = data[_HEADER_BYTES : _HEADER_BYTES + -(-count // GROUP)]
        if len(widths) * GROUP < count or (count and int(widths.max()) > MAX_WIDTH_BITS):
            raise WireError(f"{count} gaps lack their widths, or a width exceeds {MAX_WIDTH_BITS} bits")
        expected = len(widths) + int(_group_ends(widths, count)[-1])
    if rest != expected:
        raise WireError(f"{count} indices take {expected} bytes, not {rest}")
    return count


def decode_indices(data: Bytes, length: int) -> Indices:
    """The int64 [n] that `encode_indices` was given, in up to 12 bytes of memory a place.

    Raises WireError unless they ascend strictly, lie below `length` and fill the bytes to the last bit.
    """
    count = index_count(data, length)
    if data[0] == BITMAP:
        return _set_bits(data[1:], count)
    if data[0] == PACKED:
        indices = unpack(data[_HEADER_BYTES:], count, index_width(length)).astype(np.int64)
        if count and (int(indices[-1]) >= length or not bool((indices[1:] > indices[:-1]).all())):
            raise WireError(f"the indices do not ascend, or exceed the {length} values of the tensor")
        return indices
    groups = -(-count // GROUP)
    return _unpack_gaps(data[_HEADER_BYTES + groups :], data[_HEADER_BYTES : _HEADER_BYTES + groups], count, length)


@dataclass(frozen=True)
class Chunks:
    """`count` places in chunks of `length`, the last maybe shorter: `kept` of each are named, and `kept_last` of it."""

    count: int
    length: int
    kept: int
    kept_last: int

    @property
    def full(self) -> int:
        """Chunks of the whole length."""
        return self.count // self.length

    @property
    def kept_total(self) -> int:
        """Places named in all chunks together."""
        return self.full * self.kept + self.kept_last

    @property
    def width(self) -> int:
        """Bits of a place in its chunk: 12 of 4096."""
        return index_width(min(self.length, self.count))

    @property
    def is_bitmap(self) -> bool:
        """Whether a bit a place is less than `width` bits a kept place."""
        return _bitmap_bytes(self.count) < packed_bytes(self.kept_total, self.width)

    @property
    def side_bytes(self) -> int:
        """Bytes of the encoding, always."""
        return min(_bitmap_bytes(self.count), packed_bytes(self.kept_total, self.width))


def encode_chunk_indices(offsets: NDArray[np.uint32], chunks: Chunks) -> Bytes:
    """uint8 [chunks.side_bytes] of uint32 [chunks.kept_total], places in their chunk, ascending in each."""
    if not chunks.is_bitmap:
        return pack(offsets, chunks.width)
    mask = np.zeros(chunks.count, dtype=np.bool_)
    mask[_absolute(offsets, chunks)] = True
    return np.packbits(mask, bitorder="little")


def decode_chunk_indices(data: Bytes, chunks: Chunks) -> Indices:
    """int64 [chunks.kept_total]: places in the whole tensor, ascending, in up to 12 bytes of memory each.

    Raises WireError unless every chunk has as many as it should, strictly ascending within it, and no other bit is set.
    """
    if len(data) != chunks.side_bytes:
        raise WireError(f"the indices of {chunks.kept_total} values take {chunks.side_bytes} bytes, not {len(data)}")
    if not chunks.is_bitmap:
        offsets = unpack(data, chunks.kept_total, chunks.width)
        for chosen, length in _by_chunk(offsets, chunks):
            ascending = bool((chosen[:, 1:] > chosen[:, :-1]).all())
            if chosen.size and not (ascending and int(chosen[:, -1].max()) < length):
                raise WireError(f"the indices of a chunk of {length} values do not ascend, or exceed it")
        return _absolute(offsets, chunks)
    if _bitmap_count(data, chunks.count) != chunks.kept_total:
        raise WireError(f"the bitmap does not name {chunks.kept_total} values")
    places = _set_bits(data, chunks.kept_total)
    # As many in all as there should be, and no chunk's share outside of it: then every chunk has its number.
    begins = np.arange(chunks.full, dtype=np.int64)[:, None] * chunks.length
    rows = places[: chunks.full * chunks.kept].reshape(chunks.full, chunks.kept)
    strays = bool(((rows < begins) | (rows >= begins + chunks.length)).any())
    if strays or bool((places[rows.size :] < chunks.full * chunks.length).any()):
        raise WireError(f"a chunk of {chunks.length} values does not have the {chunks.kept} that it should")
    return places


def _by_chunk(offsets: NDArray[np.uint32], chunks: Chunks) -> list[tuple[NDArray[np.uint32], int]]:
    """([chunks, kept of each], values of a chunk) of the whole chunks, and of the rest."""
    whole = chunks.full * chunks.kept
    return [
        (offsets[:whole].reshape(chunks.full, chunks.kept), chunks.length),
        (offsets[whole:].reshape(1, chunks.kept_last), chunks.count - chunks.full * chunks.length),
    ]


def _absolute(offsets: NDArray[np.uint32], chunks: Chunks) -> Indices:
    places = offsets.astype(np.int64)
    whole = places[: chunks.full * chunks.kept].reshape(chunks.full, chunks.kept)
    whole += np.arange(chunks.full, dtype=np.int64)[:, None] * chunks.length
    places[whole.size :] += chunks.full * chunks.length
    return places


def _bitmap_bytes(length: int) -> int:
    return (length + 7) // 8


def _bitmap_count(data: Bytes, length: int) -> int:
    """Set bits. Raises WireError unless there is one bit a place and none behind the last."""
    if len(data) != _bitmap_bytes(length):
        raise WireError(f"a bitmap of {length} values takes {_bitmap_bytes(length)} bytes, not {len(data)}")
    if length % 8 and int(data[-1]) >> (length % 8):
        raise WireError("bits are set behind the end of the bitmap")
    blocks = range(0, len(data), _BLOCK_BYTES)
    return sum(int(np.count_nonzero(np.unpackbits(data[start : start + _BLOCK_BYTES]))) for start in blocks)


def _set_bits(data: Bytes, count: int) -> Indices:
    """Where the `count` set bits are."""
    places = np.empty(count, dtype=np.int64)
    filled = 0
    for start in range(0, len(data), _BLOCK_BYTES):
        found = np.flatnonzero(np.unpackbits(data[start : start + _BLOCK_BYTES], bitorder="little").view(np.bool_))
        np.add(found, start * 8, out=places[filled : filled + len(found)])
        filled += len(found)
    return places


def _group_widths(gaps: Indices) -> Bytes:
    """uint8 [groups]: the bits of the largest gap of every group of `GROUP`, of which the last may be shorter."""
    if not len(gaps):
        return np.zeros(0, dtype=np.uint8)
    largest = np.maximum.reduceat(gaps, np.arange(0, len(gaps), GROUP))
    return np.frexp(largest.astype(np.float64))[1].astype(np.uint8)  # the exponent is the bit length: exact to 2**53


def _group_ends(widths: Bytes, count: int) -> Indices:
    """int64 [groups + 1]: the byte at which each group of packed gaps begins, and the end of the last."""
    ends = np.zeros(len(widths) + 1, dtype=np.int64)
    np.cumsum(widths.astype(np.int64) * (GROUP // 8), out=ends[1:])
    if count % GROUP:
        ends[-1] = ends[-2] + packed_bytes(count % GROUP, int(widths[-1]))
    return ends


def _pack_gaps(gaps: NDArray[np.uint32], widths: Bytes) -> Bytes:
    """The gaps of every group at its width. Groups of one width are packed together: a whole group ends at a byte."""
    begins = _group_ends(widths, len(gaps))
    out = np.zeros(int(begins[-1]), dtype=np.uint8)
    full = len(gaps) // GROUP
    groups = gaps[: full * GROUP].reshape(full, GROUP)
    for start in range(0, full, _BLOCK_GROUPS):
        block = slice(start, min(start + _BLOCK_GROUPS, full))
        for width in np.unique(widths[block]).tolist():
            rows = start + np.flatnonzero(widths[block] == width)
            out[_bytes_of(begins[rows], width)] = pack(groups[rows].reshape(-1), width).reshape(len(rows), -1)
    if full < len(widths):
        out[int(begins[full]) :] = pack(gaps[full * GROUP :], int(widths[-1]))
    return out


def _unpack_gaps(data: Bytes, widths: Bytes, count: int, length: int) -> Indices:
    """The indices of packed gaps. Raises WireError if one reaches `length`, which also keeps the sums from overflow."""
    begins = _group_ends(widths, count)
    indices = np.empty(count, dtype=np.int64)
    full = count // GROUP
    last = -1
    for start in range(0, len(widths), _BLOCK_GROUPS):
        block = slice(start, min(start + _BLOCK_GROUPS, full))
        gaps = indices[start * GROUP : (start + _BLOCK_GROUPS) * GROUP]
        groups = gaps[: max(0, block.stop - start) * GROUP].reshape(-1, GROUP)
        for width in np.unique(widths[block]).tolist():
            rows = np.flatnonzero(widths[block] == width)
            packed = data[_bytes_of(begins[start + rows], width)].reshape(-1)
            groups[rows] = unpack(packed, len(rows) * GROUP, width).reshape(len(rows), GROUP)
        if groups.size < len(gaps):
            gaps[groups.size :] = unpack(data[int(begins[full]) :], count % GROUP, int(widths[-1]))
        gaps += 1
        gaps[0] += last
        np.cumsum(gaps, out=gaps)
        last = int(gaps[-1])
        if last >= length:
            raise WireError(f"an index exceeds the {length} values of the tensor")
    return indices


def _bytes_of(begins: Indices, width: int) -> Indices:
    """int64 [groups, bytes of a group]: where the bytes of whole groups of one width lie."""
    return begins[:, None] + np.arange(width * GROUP // 8, dtype=np.int64)


def _joined(tag: int, head: bytes, *parts: Bytes) -> Bytes:
    return np.concatenate([np.frombuffer(bytes([tag]) + head, dtype=np.uint8), *parts])
