"""The outer optimizer's momentum is gathered before it moves anything, in the style of Pier (arXiv 2511.17849).

During the first `share` of the run's sequential steps the outer step is plain averaging, while the momentum adds up the
same pseudo-gradients; then the outer optimizer takes over, with a direction that it knows. Pier's momentum may decay
from there on: `outer_momentum_schedule`.

Gathering first and handing over is Pier's. Ours is that nodes average once a round from the start, and that the
momentum gathers with the factor that it is later used with.
"""

from __future__ import annotations

from dataclasses import dataclass

from photon.config import Recipe
from photon.parts.base import Moment, Part
from photon.parts.outer_momentum_schedule import refuse_without_momentum


@dataclass(frozen=True)
class MomentumWarmup(Part):
    """A round that begins within the first `share` of the run's sequential steps averages plainly; 0: none does."""

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError("momentum_warmup: share is one of the run, from 0 to 1")

    def check(self, recipe: Recipe) -> None:
        """There is a momentum to gather."""
        refuse_without_momentum(recipe, "momentum_warmup")

    def averages(self, moment: Moment) -> bool:
        """Early in the run."""
        return moment.done < self.share


PART = MomentumWarmup
