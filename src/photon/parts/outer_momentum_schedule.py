"""A schedule of the outer momentum, over a stretch of the run: the momentum decay of Pier (arXiv 2511.17849)."""

from __future__ import annotations

from dataclasses import dataclass

from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.parts.base import Moment, Part
from photon.parts.outer_lr_schedule import Kind, between, check_stretch, stretch


@dataclass(frozen=True)
class OuterMomentumSchedule(Part):
    """`first` until `begin`, then on the way to `last`, which holds from `end` on (shares of the sequential steps).

    `federation.outer_momentum` is not looked at.
    """

    first: float = 0.95
    last: float = 0.9
    begin: float = 0.0
    end: float = 1.0
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        if not (0 <= self.first < 1 and 0 <= self.last < 1):
            raise ValueError("outer_momentum_schedule: first and last must be at least 0 and below 1")
        check_stretch("outer_momentum_schedule", self.begin, self.end)

    def check(self, recipe: Recipe) -> None:
        """There is a momentum."""
        refuse_without_momentum(recipe, "outer_momentum_schedule")

    def federation(self, federation: FederationConfig, moment: Moment) -> FederationConfig:
        """The momentum of one round."""
        momentum = between(self.first, self.last, stretch(moment, self.begin, self.end), self.kind)
        return federation.model_copy(update={"outer_momentum": momentum})


def refuse_without_momentum(recipe: Recipe, part: str) -> None:
    """Raises ConfigError if the outer optimizer has no momentum."""
    if recipe.federation.outer not in ("momentum", "nesterov"):
        raise ConfigError(
            f"federation.parts: {part} needs federation.outer = momentum or nesterov, not {recipe.federation.outer}"
        )


PART = OuterMomentumSchedule
