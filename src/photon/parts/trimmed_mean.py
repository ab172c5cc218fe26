"""The coordinate-wise trimmed mean of the updates (Yin et al. 2018, arXiv 1803.01498).

Of K values the floor(share * K) largest and as many smallest are left out, value by value, and the others averaged.
No more lies than that can take a value out of the range of the honest ones. An update counts once, whatever its tokens
(`federation.weighting` changes nothing). K are the updates that a round really got: with a quorum below 1 it may be so
few that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from photon.errors import ConfigError
from photon.parts.base import Part, Updates
from photon.parts.pieces import merged_by, ordered


@dataclass(frozen=True)
class TrimmedMean(Part):
    """The mean without the smallest and the largest `share` of the values."""

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise ValueError("trimmed_mean: share is what is left out at each end, above 0 and below 0.5")

    def check_nodes(self, nodes: int) -> None:
        """With few nodes a share may come to nobody."""
        if not self._left_out(nodes):
            raise ConfigError(
                f"federation.parts: trimmed_mean(share={self.share:g}) leaves out nothing of {nodes} updates: "
                "give a larger share, or more nodes"
            )

    def merged(self, updates: Updates) -> Iterator[tuple[str, Tensor]]:
        """The plain mean of what is left at each place."""
        count = len(updates.weights)
        drop = self._left_out(count)
        return merged_by(updates, lambda values: torch.stack(ordered(values)[drop : count - drop]).mean(0))

    def _left_out(self, count: int) -> int:
        """At each end. In decimals as written: 0.29 of 100 are 29."""
        return floor(Fraction(str(self.share)) * count)


PART = TrimmedMean
