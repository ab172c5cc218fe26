"""The weighted mean of updates that are first scaled down to the median of their norms.

Clipping by norm bounds what one update can do (Sun et al. 2019, arXiv 1911.07963); that the bound is the median of the
round, and so needs no tuning, is ours. While more than half of the updates are honest, a lie moves the mean by its
weight times an honest norm at most. It does move it, though: this is the weaker defence than the medians, and nearer to
the mean. Weights are those of `federation.weighting`. An update is one vector, its shared optimizer state with it;
scaled down, that state lies between the base's and the node's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from photon.errors import ConfigError
from photon.parts.base import Part, Updates
from photon.parts.pieces import merged_by, summed_by


@dataclass(frozen=True)
class NormClippedMean(Part):
    """No update is longer than `times` the median norm of the round."""

    times: float = 1.0

    def __post_init__(self) -> None:
        if self.times <= 0:
            raise ValueError("norm_clipped_mean: times is above 0")

    def check_nodes(self, nodes: int) -> None:
        """One update is its own median; of two, a long one raises the median with it."""
        if nodes < 3:
            raise ConfigError("federation.parts: norm_clipped_mean needs three nodes a round")

    def merged(self, updates: Updates) -> Iterator[tuple[str, Tensor]]:
        """Norms are measured in a first pass, over all tensors."""
        norms: list[float] = summed_by(updates, lambda values: values.square().sum(1)).sqrt().tolist()
        limit = self.times * median(norms)
        scales = [limit / norm if norm > limit else 1.0 for norm in norms]
        shares = torch.tensor(scales, dtype=torch.float64) * torch.tensor(updates.weights, dtype=torch.float64)
        shares /= sum(updates.weights)
        yield from merged_by(updates, lambda values: shares @ values)


PART = NormClippedMean
