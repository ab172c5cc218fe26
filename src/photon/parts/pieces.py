"""Updates side by side, a piece at a time: what a merge that is not the mean is made of.

Values are computed with in float64, and so many of them at a time that all updates together take a few MiB, however
many there are and however large a tensor is (law 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from photon.parts.base import Updates

VALUES_AT_A_TIME = 2**19  # of all updates together; 4 MiB


def merged_by(updates: Updates, rule: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as `rule` makes it of those of the updates: of float64 [K, values] it gives [values].

    The result is rounded once, to the dtype of the parameter. Raises ValueError if there is no update.
    """
    for name, tensors in _side_by_side(updates):
        merged = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
        flat = merged.view(-1)
        for piece, values in _pieces(tensors):
            flat[piece] = rule(values)
        del tensors, flat  # whoever gets the result may let go of it; updates go before the next ones come
        yield name, merged
        del merged


def summed_by(updates: Updates, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum, over all values of all tensors, of what `measure` gives for float64 [K, values]; float64."""
    total = torch.zeros((), dtype=torch.float64)
    for _, tensors in _side_by_side(updates):
        for _, values in _pieces(tensors):
            total = total + measure(values)
    return total


def ordered(values: Tensor) -> list[Tensor]:
    """The rows of [K, values], sorted value by value: the smallest first. `values` is written over.

    A sorting network, whose exchanges are whole rows: for a few rows of many values ten times as fast as `torch.sort`.
    """
    rows, spare = list(values), torch.empty_like(values[0])
    for low, high in _exchanges(len(rows)):
        torch.minimum(rows[low], rows[high], out=spare)
        torch.maximum(rows[low], rows[high], out=rows[high])
        rows[low], spare = spare, rows[low]
    return rows


def _exchanges(count: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M): pairs to be ordered."""
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return pairs


def _side_by_side(updates: Updates) -> Iterator[tuple[str, list[Tensor]]]:
    """One tensor of each update at a time."""
    readers = [updates.read(index) for index in range(len(updates.weights))]
    if not readers:
        raise ValueError("there is no update to merge")
    while (first := next(readers[0], None)) is not None:
        name, tensors = first[0], [first[1]]
        del first
        for reader in readers[1:]:
            other, tensor = next(reader)
            if other != name:
                raise ValueError(f"updates have {name!r} and {other!r} in the same place")
            tensors.append(tensor)
            del tensor
        yield name, tensors
        del tensors


def _pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Where a piece stands in the flat tensors, and its values in each: float64 [K, values]."""
    flat, step = [tensor.reshape(-1) for tensor in tensors], max(1, VALUES_AT_A_TIME // len(tensors))
    for begin in range(0, flat[0].numel(), step):
        piece = slice(begin, begin + step)
        values = torch.empty(len(flat), len(flat[0][piece]), dtype=torch.float64)
        for row, own in zip(values, flat, strict=True):
            row.copy_(own[piece])
        yield piece, values
