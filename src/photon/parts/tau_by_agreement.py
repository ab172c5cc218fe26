"""A tau that follows how far the nodes agree: exchanges are spent where the nodes would drift apart without them.

Agreement is the mean cosine over all pairs of the last round's updates. At `high` or above, tau doubles; below `low` it
halves; between, or where a round had fewer than two updates, it stays. The first round takes `federation.tau`. The run
ends after as many sequential steps as without this part, in fewer or more rounds. Exchanging by how far models have
drifted goes back to Kamp et al. 2018 (arXiv 1807.03210); this rule is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.parts.base import Moment, Part
from photon.parts.tau_ramp import refuse_own_taus


@dataclass(frozen=True)
class TauByAgreement(Part):
    """Thresholds of the mean cosine, and the bounds of tau."""

    low: float = 0.2
    high: float = 0.6
    least: int = 1
    most: int = 1024

    def __post_init__(self) -> None:
        if not -1 <= self.low <= self.high <= 1:
            raise ValueError("tau_by_agreement: low and high are cosines, and low is not above high")
        if not 1 <= self.least <= self.most:
            raise ValueError("tau_by_agreement: least must be at least 1, and most no less than that")

    def check(self, recipe: Recipe) -> None:
        """The tau that it begins with is within the bounds."""
        refuse_own_taus(recipe, "tau_by_agreement")
        tau = recipe.federation.tau
        if not self.least <= tau <= self.most:
            raise ConfigError(
                f"federation.parts: tau_by_agreement keeps tau from {self.least} to {self.most}, "
                f"and federation.tau = {tau}, which it begins with, is not there"
            )

    def check_nodes(self, nodes: int) -> None:
        """There is a pair of nodes to agree."""
        if nodes < 2:
            raise ConfigError("federation.parts: tau_by_agreement needs two nodes a round: one agrees with nobody")

    def federation(self, federation: FederationConfig, moment: Moment) -> FederationConfig:
        """tau of the round, from that of the round before."""
        tau = moment.tau or federation.tau
        if moment.agreement is not None and moment.agreement >= self.high:
            tau *= 2
        elif moment.agreement is not None and moment.agreement < self.low:
            tau //= 2
        return federation.model_copy(update={"tau": min(max(tau, self.least), self.most)})

    def least_rounds(self, federation: FederationConfig) -> int:
        """If tau doubles from the second round on, as far as it may."""
        rounds, left, tau = 0, federation.sequential_steps, federation.tau
        while left > 0:
            rounds, left, tau = rounds + 1, left - tau, min(2 * tau, self.most)
        return rounds


PART = TauByAgreement
