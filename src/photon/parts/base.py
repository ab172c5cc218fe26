"""A part: one departure from FedAvg, in a file of its own.

`federation.parts` lists them, as in `["share(second=6)", "fedprox(mu=0.01)"]`. A part is a frozen dataclass, whose
fields are its parameters. Each method of `Part` is one thing that a part may change, and does nothing here; node and
Aggregator each ask what concerns them, with the same arguments, so they need not tell each other. A part keeps no
state: what has to be remembered is a named tensor of the node or the global state, and so is committed and resumed.

**Shared tensors** are the weights and, under `parameter/kind`, the optimizer state that parts share. All of them
travel, are encoded, checked, merged and committed alike; of the state, the merge is simply the mean. A kind may be
shared by its factors, under `kind_rows` and `kind_columns` (`photon.node.shared`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from photon.config import FederationConfig, Recipe

ROWS, COLUMNS = "_rows", "_columns"
UPDATE = "update"  # of what a node remembers: its own pseudo-gradient
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Moment:
    """Where a run stands as a round begins.

    `agreement` is the mean cosine between the updates of the round before; None if there were fewer than two.
    `tau` are the local steps of that round; None before the first.
    """

    round: int
    sequential_step: int
    total_steps: int
    agreement: float | None = None
    tau: int | None = None

    @property
    def done(self) -> float:
        """The share of the run's sequential steps that lies behind, from 0 to 1."""
        return min(1.0, self.sequential_step / self.total_steps)


class Updates(Protocol):
    """The updates of a round, as often as one likes: all with the same tensors in the same order."""

    @property
    def weights(self) -> Sequence[int]:
        """The weight of each in the merge: tokens trained on, or 1."""
        ...

    def read(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Name and pseudo-gradient, one tensor at a time, each in the dtype of its parameter."""
        ...


@dataclass(frozen=True)
class Part:
    """Changes nothing: FedAvg. `__post_init__` of a part raises ValueError if a parameter is out of range."""

    # At both ends.

    def check(self, recipe: Recipe) -> None:
        """Raises ConfigError if the recipe does not suit the part. Called when the recipe is read, also at a site,
        where it names one owner: how many there are is for `check_nodes`."""

    def check_nodes(self, nodes: int) -> None:
        """Raises ConfigError if the part has no use for the updates of so few nodes a round."""

    def shared_state(self) -> frozenset[str]:
        """Kinds of optimizer state that are shared beside the weights, such as `exp_avg`."""
        return frozenset()

    def exchanged(self, shapes: Shapes, round_index: int) -> Iterable[str]:
        """Of the shared tensors, those that nodes send at the end of a round, and so the Aggregator moves."""
        return shapes

    def period(self) -> int:
        """The rounds after which what is exchanged begins anew."""
        return 1

    def is_partial(self) -> bool:
        """Whether there are rounds that exchange only some of the shared tensors: nodes then keep the base."""
        return False

    def keeps_weights(self) -> bool:
        """Whether a node may go on with weights of its own: they then are part of its state."""
        return False

    def wait_rounds(self) -> int:
        """Rounds that pass before nodes take from the base what a round has exchanged; 0: the next begins with it.

        Above 0 outer steps are taken a round later where nothing speaks against it (`Method.holds_back`).
        """
        return 0

    # At the node.

    def optimizer(self, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The local optimizer; `given` is the recipe's, new, whose groups hold parameters, peak rates and decay.

        One that is not from torch is a `photon.parts.optimizer.LocalOptimizer`, and its groups have `lr` and
        `initial_lr`, the peak.
        """
        return given

    def start(self, name: str, own: Tensor, base: Tensor) -> Tensor:
        """What a node begins with in the place of a tensor that it takes: of its own and the base's."""
        return base

    def remembers(self, federation: FederationConfig) -> Collection[str]:
        """Kinds of tensors, one of each like every weight, that a node has from one round for the start of the next.

        `UPDATE` must be among them: what the node's weights moved by. Others are what `ahead` made of them; they begin
        at zero. A node that was not in the round before, or whose round was the run's last, remembers nothing.
        """
        return ()

    def ahead(self, base: Tensor, remembered: Mapping[str, Tensor], federation: FederationConfig, nodes: int) -> Tensor:
        """What a node that remembers begins with in the place of a weight; its update is then measured from there.

        By kind what it remembers of the weight, of which all but the update may be changed in place; the options that
        hold in the round that begins, as far as they follow from its place in the run; and how many nodes have it.
        """
        return base

    def correct(self, weights: Mapping[str, nn.Parameter], base: Mapping[str, Tensor]) -> None:
        """Change the gradients of a local step, in place, before they are clipped. All tensors on the node's device.

        `base` is what the round began from; of parts by which a node keeps weights of its own, the global model.
        """

    # At the Aggregator.

    def federation(self, federation: FederationConfig, moment: Moment) -> FederationConfig:
        """The options that hold for one round: a schedule of tau, of the outer learning rate, of the momentum."""
        return federation

    def least_rounds(self, federation: FederationConfig) -> int:
        """In how few rounds the run may be over."""
        return federation.rounds

    def averages(self, moment: Moment) -> bool:
        """Whether the round's outer step is plain averaging, by which the outer optimizer only gathers its state."""
        return False

    def holds_back(self) -> bool:
        """Whether the outer step along a merged pseudo-gradient is taken a round later, at the end of the next.

        The run's last round takes both: that of the round before, then its own.
        """
        return False

    def late_rounds(self) -> int:
        """Rounds that a node may still be training after the end of its own, for its update to count in the one in
        which it comes. 0: it is abandoned when its round ends."""
        return 0

    def late_weight(self, weight: int, age: int) -> int:
        """The weight, at least 1, of an update that comes `age` rounds after its own; on time it has `weight`."""
        return weight

    def merged(self, updates: Updates) -> Iterator[tuple[str, Tensor]]:
        """The merged pseudo-gradient, where that is not the weighted mean, in the order of the updates' tensors.

        For this the updates are kept until all are there, in files. One tensor of each should be in memory at a time.
        """
        raise NotImplementedError


def changes(part: Part, method: str) -> bool:
    """Whether a part has something to say about it."""
    return getattr(type(part), method) is not getattr(Part, method)
