"""Apply a merge one round late, but a node's own share of it at once: eager updates (Kale et al. 2025, 2502.12996).

Communication that is hidden behind the next round's training is over at the end of that round. So the Aggregator holds
the merged pseudo-gradient of round t back and steps along it at the end of round t + 1. A node need not wait for its
own update, delta_m: it begins round t + 1 from

    base - 1/K * step,    step = lr (delta_m + mu V),  V = delta_m + mu V of the round before     (Nesterov)

that is, the outer optimizer's step along delta_m alone, with a velocity of the node's own, in the share that its update
has of the mean of K; momentum steps by lr V, fedavg by lr delta_m. When the merge comes, that share is in it: the next
start is made of the next base and the next step, and what was taken ahead is gone by itself. A node's update is measured
from where it began.

In the paper each worker has an outer optimizer, which steps along `(delta_m^t - delta_m^(t-1)) / M + delta^(t-1)` from
where it is. These optimizers are linear in what they are given, so the sum of their steps is the sum of those along
delta^0 ... delta^(t-1), which is the same at all workers and is the base here, and of 1/M of those along the differences
of delta_m, of which the step along delta_m^t alone is left. With schedules of the outer rate or momentum the two differ:
here what was taken ahead is taken back whole, and each merge is stepped along once, by what holds in the round after.

With `own=false` a node begins from the base: the outer step is late, and nothing makes up for it (the paper's delayed
outer gradients, which it finds to be worse).

In the run's last round nothing is left to hide behind: it takes both steps, so the final model has everything. Before
that what is evaluated is the base, which lacks the newest round's updates.

This is the arithmetic of hiding communication, for finding out what it costs in loss. The wall clock does not hide it:
our rounds do not overlap, a round still ends when its replies are merged.

What a node takes ahead is its update as trained, not as the codec of `link.up` leaves it: the paper's workers have
theirs exactly, what the codec leaves out now comes later by error feedback, and that noise is for the mean to reduce. To
`link.max_update_norm` it is scaled down, as what is merged: that limit is there so that one bad round cannot go far.
The share is 1/K also where updates weigh by tokens or fewer than K come: a node does not know of the others. One that
was not in the round before begins from the base, its velocity dropped; one whose update was refused or lost went ahead
by what never comes, and is back a round later.

A resumed run may have lost the part or got it. Without it, what is still held back is applied with the next step, before
it, and nodes begin from the base. With it, the first round moves nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.parts.base import UPDATE, Part

_VELOCITY = "velocity"
_LINEAR = ("fedavg", "momentum", "nesterov")


@dataclass(frozen=True)
class Eager(Part):
    """Merges are applied a round later; `own`: a node goes ahead by its own share."""

    own: bool = True

    def check(self, recipe: Recipe) -> None:
        """The outer optimizer is linear, and updates are differences."""
        if recipe.federation.outer not in _LINEAR:
            raise ConfigError(
                f"federation.parts: eager needs federation.outer = {', '.join(_LINEAR[:-1])} or {_LINEAR[-1]}, "
                f"not {recipe.federation.outer}: a node's own share of a step is known only where steps add up"
            )
        if recipe.link.of == "weights":
            raise ConfigError(
                "federation.parts: eager needs link.of = difference: a node's update is measured from where it began, "
                "which the Aggregator does not know"
            )

    def holds_back(self) -> bool:
        """All of it."""
        return True

    def remembers(self, federation: FederationConfig) -> Collection[str]:
        """The node's update, and where the outer optimizer has a velocity one of the node's own."""
        if not self.own:
            return ()
        return (UPDATE,) if federation.outer == "fedavg" else (UPDATE, _VELOCITY)

    def ahead(self, base: Tensor, remembered: Mapping[str, Tensor], federation: FederationConfig, nodes: int) -> Tensor:
        """Ahead of the base by the node's share of the outer step along its own update."""
        step, momentum = remembered[UPDATE], federation.outer_momentum
        if federation.outer != "fedavg":
            velocity = remembered[_VELOCITY].mul_(momentum).add_(step)
            step = step.add(velocity, alpha=momentum) if federation.outer == "nesterov" else velocity
        return base.sub(step, alpha=federation.outer_lr / nodes)


PART = Eager
