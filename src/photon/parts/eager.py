"""Apply a merge one round late, but a node's own share of it at once: eager updates (Kale et al. 2025, 2502.12996).

Communication that is hidden behind the next round's training is over at the end of that round. So the Aggregator holds
the merged pseudo-gradient of round t back and steps along it at the end of round t + 1. A node need not wait for its
own update, delta_m: it begins round t + 1 from

    base - 1/K * step,    step = lr (delta_m + mu V),  V = delta_m + mu V of the round before     (Nesterov)

which is the outer optimizer's step along delta_m alone, with a velocity of the node's own, in the share that its update
has of a mean of K; momentum steps by lr V, fedavg by lr delta_m. When the merge comes, that share is in it: the next
start is made of the next base and the next step, so what was taken ahead is gone by itself. A node's update is measured
from where it began, not from the base.

In the paper each worker has an outer optimizer, which steps along `(delta_m^t - delta_m^(t-1)) / M + delta^(t-1)` from
where it is. These optimizers are linear in what they are given. So the sum of a worker's steps is that of the steps
along delta^0 ... delta^(t-1), the same at all workers, which leads to the base; and 1/M of the steps along differences
of delta_m, of which the one along delta_m^t is left. With a schedule of the outer rate or momentum the two differ: the
options of round t + 1 are those of both steps along round t, so that here all that was taken ahead is taken back.

With `own=false` a node begins from the base: the outer step is late, and nothing makes up for it (the paper's delayed
outer gradients, which it finds to be worse).

In the run's last round nothing is left to hide behind: it takes both steps, so the final model has everything. Before
that what is evaluated is the base, which lacks the newest round's updates.

Between machines the wall clock hides it too: the base of round t + 1 is known when round t begins, nodes are told of it
then, and train on while their updates travel and are merged (`photon.aggregator.early`). On one machine there is
nothing to hide, and the arithmetic is the same: there one finds out what it costs in loss.

A node takes its update ahead as trained, not as the codec of `link.up` leaves it: so do the paper's workers, error
feedback sends later what was left out now, and what a codec distorts is for the mean to even out. It is scaled down to
`link.max_update_norm`, as what is merged is: one bad round shall not go far. The share is 1/K also where updates weigh
by tokens or fewer than K come, for a node does not know the others. One that was not in the round before begins from
the base, and its velocity is dropped. One whose update was refused or lost went ahead by what never comes; a round
later that is gone, but for what its velocity has of it.

A recipe may be changed between two rounds. Where the part is taken out, what is still held back is applied before the
next step, and nodes begin from the base. Where it is put in, the first round moves nothing.
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
        """The outer optimizer is linear."""
        if recipe.federation.outer not in _LINEAR:
            raise ConfigError(
                f"federation.parts: eager needs federation.outer = {', '.join(_LINEAR[:-1])} or {_LINEAR[-1]}, "
                f"not {recipe.federation.outer}: a node's own share of a step is known only where steps add up"
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
