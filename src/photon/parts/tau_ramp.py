"""A tau that grows over the run: many exchanges while the model changes quickly, few when it has settled.

Round r of R takes the steps from C(r) to C(r + 1), where C is the integral of a power of the share of rounds x = r / R,
rounded to whole steps:

    tau(x) = first + (last - first) x^p,     C(r) = round(R (first x + (last - first) x^(p + 1) / (p + 1)))

The mean of tau(x) is `federation.tau` for p = (last - tau) / (tau - first), so C(R) is rounds x tau, and the run takes
exactly the sequential steps of one with a fixed tau, in as many rounds. Without `last`, it is 2 tau - first: a line.
Growing periods go back to Haddadpour et al. 2019 (arXiv 1910.13598); this law is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.parts.base import Moment, Part

_MOST_TAU = 10**9


@dataclass(frozen=True)
class TauRamp(Part):
    """Local steps from `first` to `last`, `federation.tau` between them, and if `last` is 0 in the middle."""

    first: int = 8
    last: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= _MOST_TAU or not 0 <= self.last <= _MOST_TAU:
            raise ValueError("tau_ramp: first must be at least 1, and last too, or 0 for a straight line; 1e9 at most")

    def check(self, recipe: Recipe) -> None:
        """`federation.tau`, the mean, lies between both ends."""
        refuse_own_taus(recipe, "tau_ramp")
        tau, last = recipe.federation.tau, self._last(recipe.federation.tau)
        if not (self.first < tau < last or self.first == tau == last or 0 < last < tau < self.first):
            raise ConfigError(
                f"federation.parts: tau_ramp goes from {self.first} to {last}, but federation.tau = {tau}, "
                "the mean over all rounds, must lie between"
            )

    def federation(self, federation: FederationConfig, moment: Moment) -> FederationConfig:
        """tau of the round by its number alone."""
        rounds, tau = federation.rounds, federation.tau
        steps = self._steps_before(moment.round + 1, rounds, tau) - self._steps_before(moment.round, rounds, tau)
        return federation.model_copy(update={"tau": max(1, steps)})

    def _last(self, tau: int) -> int:
        return self.last or 2 * tau - self.first

    def _steps_before(self, round_index: int, rounds: int, tau: int) -> int:
        if self.first == tau:
            return round_index * tau
        last, share = self._last(tau), round_index / rounds
        power = (last - tau) / (tau - self.first)
        mean = self.first * share + (last - self.first) * math.pow(share, power + 1) / (power + 1)
        return round(rounds * mean)


def refuse_own_taus(recipe: Recipe, part: str) -> None:
    """Raises ConfigError if a silo has a tau of its own, or if another part sets it too: one schedule holds for all."""
    own = [silo.name for silo in recipe.silo if silo.tau is not None]
    if own:
        raise ConfigError(f"federation.parts: {part} sets tau of all nodes, but silo {own[0]} has a tau of its own")
    names = [text.partition("(")[0].strip() for text in recipe.federation.parts]
    if sum(name in ("tau_ramp", "tau_by_agreement") for name in names) > 1:
        raise ConfigError("federation.parts: tau_ramp and tau_by_agreement each set tau: give one of them, once")


PART = TauRamp
