"""The coordinate-wise median of the updates instead of their mean (Yin et al. 2018, arXiv 1803.01498).

As long as fewer than half of the updates are lies, each value of the result lies within the range of the honest ones.
Of an even number it is the mean of the middle two. An update counts once, whatever its tokens (`federation.weighting`
changes nothing): tokens are what a node says of itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from photon.errors import ConfigError
from photon.parts.base import Part, Updates
from photon.parts.pieces import merged_by, ordered


@dataclass(frozen=True)
class Median(Part):
    """Value by value the middle of the updates."""

    def check_nodes(self, nodes: int) -> None:
        """The median of two is their mean."""
        if nodes < 3:
            raise ConfigError("federation.parts: median needs three nodes a round; of two it is the mean")

    def merged(self, updates: Updates) -> Iterator[tuple[str, Tensor]]:
        """The middle value, or the mean of the middle two."""
        return merged_by(updates, _middle)


def _middle(values: Tensor) -> Tensor:
    rows = ordered(values)
    return (rows[(len(rows) - 1) // 2] + rows[len(rows) // 2]) / 2


PART = Median
