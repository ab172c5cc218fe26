"""Late updates count, for less: rounds end at quorum and grace, and who still trains then goes on.

The form of Decoupled DiLoCo (Douillard et al. 2026, arXiv 2604.21428): a minimum quorum, a grace time, weights by
tokens, and nobody waits for the slowest. A node that is late gets no new task. Its update counts in the round in which
it comes, as it is: `theta_s - theta_k` of the round s that it began in, with the weight `tokens * discount^age`, age
being the rounds that have ended since. Above an age of `rounds` it is abandoned. Its next task starts from the newest
base.

Late updates help the quorum: it says how many nodes a step needs behind it, and without them every straggler would
bring the next round nearer to failing. But a grace time begins with a fresh update at the earliest, as long as one may
come: the merge divides by the weights, so a discount means nothing where all are late. K are fresh updates, and nobody
waits for a late one once the quorum is there. The run's last round abandons whoever is late when it ends. Of a late
reply only the update counts: its scores are of a model that has been left behind.

Ours, not the paper's: discount and age limit; its learners never stop, send fragments, weigh tokens by speed too, and
merge norm and direction apart. After a crash of the Aggregator a late update answers nothing: it is dropped, charged to
nobody, and its text is not trained again in this epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from photon.config import Recipe
from photon.errors import ConfigError
from photon.parts.base import Part

_MOST_ROUNDS = 100


@dataclass(frozen=True)
class Stale(Part):
    """An update may come up to `rounds` rounds late, and weighs `discount` times as much for each of them."""

    rounds: int = 2
    discount: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            raise ValueError(f"stale: rounds is from 1 to {_MOST_ROUNDS}")
        if not 0 < self.discount <= 1:
            raise ValueError("stale: discount is above 0 and at most 1; to drop what is late, leave the part out")

    def check(self, recipe: Recipe) -> None:
        """Local weights are nothing without the base that they began from, which is gone."""
        if recipe.link.of == "weights":
            raise ConfigError("federation.parts: stale needs link.of = difference: the base of a late update is gone")
        if recipe.federation.quorum == 1 and not recipe.federation.oversample:
            raise ConfigError(
                "federation.parts: stale needs federation.quorum below 1, or oversample: now a round waits for all"
            )

    def late_rounds(self) -> int:
        """As given."""
        return self.rounds

    def late_weight(self, weight: int, age: int) -> int:
        """To the nearest whole number; of an exact fraction, so that it is the same everywhere."""
        return max(1, round(weight * Fraction(str(self.discount)) ** age))


PART = Stale
