"""Share the optimizer's moments too: Local Adam, and DES-LOC where they travel more rarely than the weights.

Every node's moments are replaced by their mean, and go on from there. With `first = second = 1` that is Local Adam;
with periods near 3 and 6, in rounds, DES-LOC (Iacob et al. 2025, arXiv 2505.22549), which sets them by the half-lives
`ln(0.5) / ln(beta)` of the moments. A moment whose period is 0 stays at its node; where a first moment is taken over a
second one that stayed, no step is longer than ten learning rates (that much is ours, see `photon.node.shared`). With a
second moment that is taken all nodes count steps alike (the sequential step), so that its bias correction is everywhere
the same.

With `factored` a matrix's second moment travels as the means of its rows and columns, and every node goes on with their
outer product: next to no bytes, and no codec can make it negative by rounding a difference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

from photon.config import Recipe
from photon.errors import ConfigError
from photon.parts.base import COLUMNS, ROWS, Part, Shapes

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq",)
_FACTORS = tuple(kind + end for kind in _SECOND for end in (ROWS, COLUMNS))


@dataclass(frozen=True)
class Share(Part):
    """Every `first` rounds the first moments (Muon's and SGD's momentum too), every `second` the second ones."""

    first: int = 1
    second: int = 1
    factored: bool = False

    def __post_init__(self) -> None:
        if self.first < 0 or self.second < 0 or not (self.first or self.second):
            raise ValueError("share: first and second are rounds, 0 = never, and not both are 0")

    def check(self, recipe: Recipe) -> None:
        """A moment that is thrown away at the end of a round cannot be shared rarely."""
        if recipe.node.optimizer_state == "reset" and max(self.first, self.second) > 1:
            raise ConfigError("federation.parts: share with a period above 1 needs node.optimizer_state = keep")
        if recipe.node.optimizer_state == "reset" and not self.second and recipe.node.optimizer != "sgd":
            raise ConfigError(
                "federation.parts: share(second=0) needs node.optimizer_state = keep: a first moment that is shared is "
                "divided by a second one, which is thrown away"
            )
        if recipe.node.optimizer == "sgd" and not (recipe.node.momentum and self.first):
            raise ConfigError(
                "federation.parts: share has nothing to share: SGD keeps its momentum, if node.momentum is not 0, and "
                "nothing else"
            )

    def shared_state(self) -> frozenset[str]:
        """The kinds whose period is not 0."""
        second = _FACTORS if self.factored else _SECOND
        return frozenset((*(_FIRST if self.first else ()), *(second if self.second else ())))

    def period(self) -> int:
        """The rounds until both kinds travel in the same round."""
        return lcm(self.first or 1, self.second or 1)

    def is_partial(self) -> bool:
        """Only with a period above 1."""
        return max(self.first, self.second) > 1

    def exchanged(self, shapes: Shapes, round_index: int) -> Iterable[str]:
        """The weights each time; a moment in the last round of each of its periods."""
        periods = {name: self._period(name) for name in shapes}
        return [name for name, period in periods.items() if not period or (round_index + 1) % period == 0]

    def _period(self, name: str) -> int:
        _, _, kind = name.rpartition("/")
        return self.first if kind in _FIRST else self.second if kind in _SECOND + _FACTORS else 1


PART = Share
