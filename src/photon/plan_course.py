"""The rounds of a run and their local steps, where a part sets tau by itself: walked through before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from photon.config import Recipe
    from photon.parts.method import Method


@dataclass(frozen=True)
class Course:
    """tau of every round. `rounds_at_ends`: how many there are if all nodes agree fully, and if they are opposed.

    Where these differ, tau follows the nodes, and `taus` are those of a run of which nobody knows how far they agree.
    """

    taus: tuple[int, ...]
    rounds_at_ends: tuple[int, int]

    @property
    def rounds(self) -> int:
        """Exchanges."""
        return len(self.taus)

    @property
    def mean_tau(self) -> float:
        """Local steps of a mean round."""
        return sum(self.taus) / len(self.taus)

    @property
    def follows_nodes(self) -> bool:
        """Whether the number of rounds is not known before the run."""
        return len({self.rounds, *self.rounds_at_ends}) > 1


def course_of(recipe: Recipe) -> Course:
    """The course of a run, by the functions that the Aggregator asks. Raises ConfigError if a part does not suit it."""
    federation = recipe.federation
    fixed = Course((federation.tau,) * federation.rounds, (federation.rounds, federation.rounds))
    if not federation.parts:
        return fixed
    from photon.parts.base import changes  # here, because they bring torch
    from photon.parts.method import Method

    method = Method.of(recipe)
    if not any(changes(part, "federation") for part in method.parts):
        return fixed
    ends = len(_taus(recipe, method, 1.0)), len(_taus(recipe, method, -1.0))
    return Course(tuple(_taus(recipe, method, None)), ends)


def _taus(recipe: Recipe, method: Method, agreement: float | None) -> list[int]:
    """Round by round as `photon.aggregator.server` does, with this agreement after each but the first."""
    from photon.parts.base import Moment

    steps, taus, done = recipe.federation.sequential_steps, list[int](), 0
    while done < steps:
        known = taus[-1] if taus else None
        moment = Moment(len(taus), done, steps, agreement if taus else None, known)
        taus.append(method.federation(recipe.federation, moment).tau)
        done += taus[-1]
    return taus
