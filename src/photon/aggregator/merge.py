"""The merge: the weighted mean of pseudo-gradients, folded as they arrive, the same to the last bit in any order.

Floating-point sums depend on their order. So each weighted update is rounded once to a fixed-point grid and added
as int64, where addition is associative and exact. The grid is 2^-52 of the mean's unit (about 2e-16, finer than
float32 resolves any weight above 1e-9) and holds means up to 1024; a coordinate beyond that is refused before it is
folded. Memory is 8 bytes per parameter, whatever the number of nodes (law 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

MAX_ABS_UPDATE = 1024.0
_FRACTION_BITS = 52
_CHUNK_ELEMENTS = 2**16  # bounds the temporaries of a fold and of the result to 512 KiB each


class Merge:
    """Folds `sum_k w_k delta_k` and divides by `sum_k w_k` at the end.

    Weights are whole numbers (tokens really trained on). `max_weight` bounds their sum and fixes the grid, so it
    must be known before the first reply: the tokens of all tasks of the round.
    """

    def __init__(self, like: Mapping[str, Tensor], max_weight: int) -> None:
        if max_weight < 1:
            raise ValueError(f"max_weight must be at least 1, not {max_weight}")
        self._like = {name: tensor.dtype for name, tensor in like.items()}
        self._sums = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in like.items()}
        self._max_weight = max_weight
        self._scale_bits = _FRACTION_BITS - (max_weight - 1).bit_length()
        self.weight = 0

    def fold(self, update: Iterable[tuple[str, Tensor]], weight: int) -> None:
        """Add one node's update (all names, each |value| <= MAX_ABS_UPDATE) with a positive weight."""
        if not 0 < weight <= self._max_weight - self.weight:
            raise ValueError(f"weight {weight} does not fit: {self.weight} of {self._max_weight} are folded")
        factor = float(weight) * 2.0**self._scale_bits
        for name, delta in update:
            total, flat = self._sums[name].view(-1), delta.reshape(-1)
            for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
                part = flat[begin : begin + _CHUNK_ELEMENTS].to(torch.float64, copy=True)
                total[begin : begin + _CHUNK_ELEMENTS] += part.mul_(factor).round_().to(torch.int64)
        self.weight += weight

    def result(self) -> Iterator[tuple[str, Tensor]]:
        """The merged pseudo-gradient by name, in each parameter's own dtype. Call it once: it takes the sums away.

        A tensor is made when it is asked for, and written over its sums: nothing is added to the memory of the merge,
        and a tensor's is free once the caller lets go of it. Raises ValueError if nothing was folded.
        """
        if self.weight == 0:
            raise ValueError("nothing was folded")
        return self._means(float(self.weight) * 2.0**self._scale_bits)

    def _means(self, divisor: float) -> Iterator[tuple[str, Tensor]]:
        for name in list(self._sums):
            yield name, _divide(self._sums.pop(name), divisor, self._like[name])


def _divide(sums: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    """`sums / divisor` of int64 sums, rounded once to `dtype`, which is no wider; it takes the place of the sums."""
    flat = sums.view(-1)
    mean = flat.view(dtype)[: flat.numel()]
    for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
        # A piece is read before it is written, and what is written ends no later than what has been read.
        part = flat[begin : begin + _CHUNK_ELEMENTS].double()
        mean[begin : begin + _CHUNK_ELEMENTS] = part.div_(divisor)
    return mean.view(sums.shape)
