"""The geometric median of the updates: the point whose weighted distances to them are least in sum.

RFA (Pillutla et al. 2022, arXiv 1912.13445), by the smoothed Weiszfeld iteration from the weighted mean on: each update
is averaged with its weight, divided by its distance to where one stands. An update is one vector, its shared optimizer
state with it. Weights are those of `federation.weighting`; lies of less than half of all weight move the result only so
far, so where a node's word about its tokens is not to be trusted, let it be uniform.

Where one stands is always a mixture of the updates, so its distances follow from theirs to one another. All that reads
updates are therefore one pass for those distances and one for the mixture at the end; an iteration is over K numbers.
Iterations are free, unlike in the paper, and should be many: if the lies agree, each brings one nearer by no more
than the ratio of their weight to the honest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.errors import ConfigError
from photon.parts.base import Part, Updates
from photon.parts.pieces import merged_by, summed_by

_LEAST_SMOOTHING = 1e-30  # a weight over much less is infinite


@dataclass(frozen=True)
class GeometricMedian(Part):
    """`smoothing` is the least distance that an iteration divides by."""

    iterations: int = 100
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.smoothing < _LEAST_SMOOTHING:
            raise ValueError(f"geometric_median: iterations is at least 1, smoothing {_LEAST_SMOOTHING:g}")

    def check_nodes(self, nodes: int) -> None:
        """Between two updates any point is a geometric median."""
        if nodes < 3:
            raise ConfigError("federation.parts: geometric_median needs three nodes a round")

    def merged(self, updates: Updates) -> Iterator[tuple[str, Tensor]]:
        """A mixture of the updates, all tensors in the same shares."""
        squares = _square_distances(updates)
        weights = torch.tensor(updates.weights, dtype=torch.float64)
        shares = weights / weights.sum()
        for _ in range(self.iterations):
            # |sum_i s_i x_i - x_k|^2 = sum_i s_i d_ik^2 - sum_ij s_i s_j d_ij^2 / 2, if the shares add up to 1.
            near = squares @ shares
            distances = (near - shares @ near / 2).clamp(min=0).sqrt()
            shares = weights / distances.clamp(min=self.smoothing)
            shares /= shares.sum()
        yield from merged_by(updates, lambda values: shares @ values)


def _square_distances(updates: Updates) -> Tensor:
    """[K, K] of one update to another."""
    count = len(updates.weights)
    pairs = summed_by(updates, lambda values: torch.pdist(values).square())
    squares = torch.zeros(count, count, dtype=torch.float64)
    rows, columns = torch.triu_indices(count, count, offset=1)
    squares[rows, columns] = squares[columns, rows] = pairs
    return squares


PART = GeometricMedian
