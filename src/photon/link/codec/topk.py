"""Top-k: the values of largest magnitude and where they stand; the rest decodes to zero.

Magnitudes are compared as integers: a float32 without its sign bit, read as an int32, is in the same order. Of equal
magnitudes the one at the lower index goes first, so the same tensor always gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.base import Context, Reduced, ReducedSize, Shape
from photon.link.codec.indices import (
    Chunks,
    decode_chunk_indices,
    decode_indices,
    encode_chunk_indices,
    encode_indices,
    index_count,
    max_index_bytes,
)

MAX_CHUNK = 2**24
_BLOCK_VALUES = 2**18  # a MiB: a block and what is computed of it stay in the second-level cache
_MAGNITUDE = np.int32(0x7FFFFFFF)
_BIN_BITS = 15  # a bin holds the magnitudes that differ only in so many of their lowest bits
_BINS = 1 << (31 - _BIN_BITS)

Values = NDArray[np.float32]
Magnitudes = NDArray[np.int32]


@dataclass(frozen=True)
class TopK:
    """Keep the share `density` of the values, those of largest magnitude, as float32 in ascending order of their index.

    "chunk": of every `chunk` values in a row, and of the rest (SparseLoCo, arXiv 2508.15706); always
    max(1, round(density * length)) of each, zeros too. "tensor": so many of the tensor, but no zeros. "global": of all
    tensors together, by the threshold that `survey` finds; no zeros either.
    """

    density: float = 0.02
    scope: Literal["chunk", "tensor", "global"] = "chunk"
    chunk: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, not {self.density}")
        if self.scope not in ("chunk", "tensor", "global"):
            raise ValueError(f"scope must be chunk, tensor or global, not {self.scope!r}")
        if not 1 <= self.chunk <= MAX_CHUNK:
            raise ValueError(f"chunk must be from 1 to {MAX_CHUNK} values, not {self.chunk}")

    def survey(self, tensors: Iterable[Tensor]) -> float | None:
        """For the scope "global", the magnitude from which on values are kept; reads each tensor once, holds none.

        It is the lowest edge of a bin (2**-9 to 2**-8 of its values wide) above which lie at most density * n of
        all n values: never more than asked, and fewer by less than a bin. Only if the topmost bin that holds any is
        larger than that, as of equal values everywhere, is it kept as a whole, for otherwise nothing ever would be.
        """
        if self.scope != "global":
            return None
        histogram, count = np.zeros(_BINS, dtype=np.int64), 0
        for tensor in tensors:
            histogram += _histogram(_flat(tensor))
            count += tensor.numel()
        from_top = np.cumsum(histogram[::-1])
        bins = int(np.searchsorted(from_top, self._kept(count), side="right"))
        if bins == 0 or from_top[bins - 1] == 0:
            bins = min(bins + 1, _BINS)
        return float(np.array(_floor(bins), dtype=np.int32).view(np.float32))

    def encode(self, tensor: Tensor, context: Context) -> Reduced:
        """See `Transform.encode`. Raises ValueError if the scope is "global" and the context has no survey."""
        flat = _flat(tensor)
        if self.scope == "chunk":
            chunks = self._chunks(flat.size)
            values, offsets = _select_by_chunk(flat, chunks)
            return Reduced(torch.from_numpy(values), torch.from_numpy(encode_chunk_indices(offsets, chunks)))
        if self.scope == "tensor":
            indices = _select(flat, self._kept(len(flat)))
        elif context.survey is None:
            raise ValueError("a top-k of the scope 'global' needs the survey of all tensors")
        else:
            indices = _at_least(flat, max(1, int(np.array(context.survey, dtype=np.float32).view(np.int32))))
        return Reduced(torch.from_numpy(flat[indices]), torch.from_numpy(encode_indices(indices, len(flat))))

    def size(self, shape: Shape) -> ReducedSize:
        """See `Transform.size`: exact for the scope "chunk". With "global" one tensor may be kept as a whole."""
        count = prod(shape)
        if self.scope == "chunk":
            chunks = self._chunks(count)
            return ReducedSize(chunks.kept_total, chunks.side_bytes, is_exact=True)
        kept = self._most(count)
        return ReducedSize(kept, max_index_bytes(count, kept), is_exact=False)

    def value_count(self, side: Tensor, shape: Shape) -> int:
        """See `Transform.value_count`; of the indices it checks their number and their bytes alone."""
        count = prod(shape)
        if self.scope != "chunk":
            found = index_count(side.numpy(), count)
            if found > self._most(count):
                raise WireError(f"{found} values are kept of a tensor of {count}: {self._most(count)} at most")
            return found
        chunks = self._chunks(count)
        if side.numel() != chunks.side_bytes:
            raise WireError(f"the indices of {shape} take {chunks.side_bytes} bytes, not {side.numel()}")
        return chunks.kept_total

    def decode(self, values: Tensor, side: Tensor, shape: Shape) -> Tensor:
        """See `Transform.decode`."""
        kept, count = self.value_count(side, shape), prod(shape)
        if values.numel() != kept:
            raise WireError(f"{values.numel()} values came with the indices of {kept}")
        if self.scope == "chunk":
            indices = decode_chunk_indices(side.numpy(), self._chunks(count))
        else:
            indices = decode_indices(side.numpy(), count)
        out = torch.zeros(shape, dtype=torch.float32)
        out.view(-1).numpy()[indices] = values.numpy()
        return out

    def _kept(self, count: int) -> int:
        """How many of so many values to keep; a half is rounded to the even number."""
        return max(min(1, count), round(self.density * count))

    def _most(self, count: int) -> int:
        return count if self.scope == "global" else self._kept(count)

    def _chunks(self, count: int) -> Chunks:
        return Chunks(count, self.chunk, self._kept(self.chunk), self._kept(count % self.chunk))


def _flat(tensor: Tensor) -> Values:
    flat: Values = tensor.detach().contiguous().view(-1).numpy()
    return flat


def _blocks(flat: Values) -> Iterator[tuple[int, Magnitudes]]:
    """(where it begins, magnitudes) of every block; the memory is used again for the next."""
    room = np.empty(min(_BLOCK_VALUES, len(flat)), dtype=np.int32)
    for start in range(0, len(flat), _BLOCK_VALUES):
        bits = flat[start : start + _BLOCK_VALUES].view(np.int32)
        yield start, np.bitwise_and(bits, _MAGNITUDE, out=room[: len(bits)])


def _histogram(flat: Values) -> NDArray[np.int64]:
    """int64 [_BINS]: how many magnitudes other than zero fall into each bin."""
    histogram = np.zeros(_BINS, dtype=np.int64)
    for _, magnitudes in _blocks(flat):
        histogram[0] -= len(magnitudes) - np.count_nonzero(magnitudes)
        histogram += np.bincount(magnitudes >> _BIN_BITS, minlength=_BINS)
    return histogram


def _floor(bins: int) -> int:
    """The least magnitude, as an integer, in the topmost `bins` bins; never that of zero."""
    return max(1, (_BINS - bins) << _BIN_BITS)


def _at_least(flat: Values, floor: int) -> NDArray[np.int64]:
    """Ascending indices of all magnitudes from `floor` on."""
    found = [np.flatnonzero(magnitudes >= floor) + start for start, magnitudes in _blocks(flat)]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _select(flat: Values, count: int) -> NDArray[np.int64]:
    """Ascending indices of the `count` largest magnitudes, or of all that are not zero if they are fewer.

    A histogram finds the bin with the last of them, so that only what lies in that bin is left to be put in order.
    """
    from_top = np.cumsum(_histogram(flat)[::-1])
    candidates = _at_least(flat, _floor(min(int(np.searchsorted(from_top, count)) + 1, _BINS)))
    if len(candidates) <= count:
        return candidates
    magnitudes = flat[candidates].view(np.int32) & _MAGNITUDE
    least = np.sort(magnitudes)[len(magnitudes) - count]  # np.partition is up to 10 times slower if many are equal
    keep = magnitudes > least
    equals = np.flatnonzero(magnitudes == least)
    keep[equals[: count - np.count_nonzero(keep)]] = True
    chosen: NDArray[np.int64] = candidates[keep]
    return chosen


def _select_by_chunk(flat: Values, chunks: Chunks) -> tuple[Values, NDArray[np.uint32]]:
    """The kept float32 values, and uint32 their places in their chunk, ascending in each; both [chunks.kept_total]."""
    values = np.empty(chunks.kept_total, dtype=np.float32)
    offsets = np.empty(chunks.kept_total, dtype=np.uint32)
    rows = max(1, _BLOCK_VALUES // chunks.length)
    spans = [(start, min(start + rows, chunks.full)) for start in range(0, chunks.full, rows)]
    pieces = [(begin * chunks.length, (end - begin, chunks.length), chunks.kept) for begin, end in spans]
    whole = chunks.full * chunks.length
    if whole < len(flat):
        pieces.append((whole, (1, len(flat) - whole), chunks.kept_last))
    filled = 0
    for start, (height, length), kept in pieces:
        block = flat[start : start + height * length].reshape(height, length)
        places = _largest_of_rows(block.view(np.int32) & _MAGNITUDE, kept)
        end = filled + places.size
        offsets[filled:end].reshape(places.shape)[:] = places
        values[filled:end].reshape(places.shape)[:] = np.take_along_axis(block, places, axis=1)
        filled = end
    return values, offsets


def _largest_of_rows(magnitudes: Magnitudes, count: int) -> NDArray[np.int64]:
    """int64 [rows, count]: ascending places of the `count` largest magnitudes of every row of int32 [rows, length].

    Few values are looked at closely: the `count`-th largest of the maxima of groups is no more than that of the values,
    for as many groups hold a value as large. Maxima are sorted: np.partition is much slower where many are equal.
    """
    rows, length = magnitudes.shape
    groups = next((g for g in (16, 8, 4, 2) if length % g == 0 and length // g >= 2 * count), 1)
    maxima = magnitudes.reshape(rows, groups, length // groups).max(axis=1) if groups > 1 else magnitudes
    floors = np.sort(maxima, axis=1)[:, maxima.shape[1] - count]
    chosen = magnitudes >= np.maximum(floors, 1)[:, None]
    chosen[floors == 0, :count] = True  # zeros may be needed too: the first, which are among the first `count` values
    found = np.flatnonzero(chosen)
    row, place = np.divmod(found, length)
    begins = np.searchsorted(found, np.arange(rows + 1, dtype=np.int64) * length)
    widest = int(np.diff(begins).max())
    if widest == count:
        return place.reshape(rows, count)
    # One number orders by magnitude, then by the lower place: no two are equal, so exactly `count` remain.
    bits = (length - 1).bit_length()
    keys = np.tile(-1 - np.arange(widest, dtype=np.int64), (rows, 1))  # of no value; unequal, which is faster
    largest_first = (magnitudes.reshape(-1)[found].astype(np.int64) << bits) + (length - 1 - place)
    keys[row, np.arange(len(found)) - begins[row]] = largest_first
    keys.partition(widest - count, axis=1)
    places: NDArray[np.int64] = length - 1 - (keys[:, widest - count :] & (2**bits - 1))
    places.sort(axis=1)
    return places
