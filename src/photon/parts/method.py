"""The parts of a recipe as one: what node and Aggregator ask."""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import photon.parts
from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.notation import parse_call
from photon.parts.base import Moment, Part, Shapes, Updates, changes

_NOT_PARTS = frozenset({"base", "method", "optimizer", "pieces"})
STATE_MARK = "/"  # parameter/kind: no parameter's name has one


def part_names() -> list[str]:
    """Every part there is: each is the class `PART` of the file of its name beside this one."""
    return sorted(
        module.name for module in pkgutil.iter_modules(photon.parts.__path__) if module.name not in _NOT_PARTS
    )


def part_class(name: str) -> type[Part]:
    """The part of that name, one of `part_names`."""
    kind: type[Part] = importlib.import_module(f"photon.parts.{name}").PART
    return kind


class _Kinds(Mapping[str, type]):
    """Parts by name, imported when asked for."""

    def __getitem__(self, name: str) -> type[Part]:
        if name not in part_names():
            raise KeyError(name)
        return part_class(name)

    def __iter__(self) -> Iterator[str]:
        return iter(part_names())

    def __len__(self) -> int:
        return len(part_names())


@dataclass(frozen=True)
class Method:
    """FedAvg, and in this order the parts that change it."""

    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Method:
        """As the recipe says; the centralised baseline (`federation.outer = none`) has no parts.

        Raises ConfigError for a part that there is not, or that does not suit the recipe.
        """
        try:
            method = cls(
                tuple(parse_call(text, _Kinds(), "part", "fedprox(mu=0.01)") for text in recipe.federation.parts)
            )
        except ValueError as error:
            raise ConfigError(f"federation.parts: {error}") from None
        method._check(recipe)
        return method if recipe.federation.outer != "none" else cls()

    def _check(self, recipe: Recipe) -> None:
        for what in ("optimizer", "start", "ahead", "merged", "late_rounds"):
            if len(names := [type(part).__name__ for part in self.parts if changes(part, what)]) > 1:
                raise ConfigError(
                    f"federation.parts: {' and '.join(names)} cannot go together: each has its own {what}"
                )
        if self.late_rounds and (self.is_partial or self.shared_state or self.merged):
            raise ConfigError(
                "federation.parts: updates that may come late are of whole models without optimizer state, and the "
                "merge is their weighted mean: stale goes with no part that changes one of these"
            )
        self._check_held_back(recipe.federation.balance)
        for one, other in itertools.combinations(self.parts, 2):
            if (common := math.gcd(one.period(), other.period())) > 1:
                raise ConfigError(
                    f"federation.parts: {type(one).__name__} and {type(other).__name__} both have their turns every "
                    f"{common} rounds or a multiple of that, so some tensors would never have both: periods without "
                    "a common divisor are needed"
                )
        if self.shared_state and self.is_partial and recipe.node.optimizer_state == "reset":
            raise ConfigError(
                "federation.parts: optimizer state that is not exchanged in every round needs "
                "node.optimizer_state = keep"
            )
        if (self.is_partial or self.shared_state or self.goes_ahead) and recipe.link.of == "weights":
            raise ConfigError(
                "link.of = weights sends all weights each time, to be compared with the base: it does not go with "
                "these federation.parts"
            )
        turns = max((part.period() for part in self.parts if part.keeps_weights()), default=1)
        if (least := self.least_rounds(recipe.federation)) < turns:
            raise ConfigError(
                f"federation.parts: it takes {turns} rounds to exchange every weight once, and the run may be over "
                f"after {least}: more rounds are needed, or fewer fragments"
            )
        for part in self.parts:
            part.check(recipe)

    def check_nodes(self, nodes: int) -> None:
        """Raises ConfigError if the updates of so few nodes a round do not suit a part."""
        for part in self.parts:
            part.check_nodes(nodes)

    def _check_held_back(self, balance: str) -> None:
        partial = self.is_partial or self.keeps_weights or self.shared_state
        asks = any(part.holds_back() for part in self.parts)
        if (asks or self.goes_ahead) and (partial or self.late_rounds or self._averages):
            raise ConfigError(
                "federation.parts: where outer steps are taken a round later, every round exchanges all weights and no "
                "optimizer state, updates come in time, and the outer optimizer itself moves the model: eager goes "
                "with no part that changes one of these"
            )
        if self.goes_ahead and self.finds_tau and balance == "time":
            raise ConfigError(
                "federation.parts: a node that takes fewer steps than others cannot tell from them when a run of "
                "changing tau ends: eager does not go with tau_by_agreement and federation.balance = time"
            )
        if self.merged and self.goes_ahead:
            raise ConfigError(
                "federation.parts: a node's own share of a merge is known only if that is the mean: eager goes with no "
                "part that merges in another way"
            )

    # What travels.

    @property
    def shared_state(self) -> frozenset[str]:
        """Kinds of optimizer state that are shared."""
        return frozenset().union(*(part.shared_state() for part in self.parts))

    @property
    def period(self) -> int:
        """The rounds after which what is exchanged begins anew."""
        return math.lcm(*(part.period() for part in self.parts))

    @property
    def is_partial(self) -> bool:
        """Whether a round may exchange only some of the shared tensors; nodes then keep the base."""
        return any(part.is_partial() for part in self.parts)

    @property
    def keeps_weights(self) -> bool:
        """Whether nodes go on with weights of their own, and so keep them between rounds."""
        return any(part.keeps_weights() for part in self.parts)

    def exchanged(self, shapes: Shapes, round_index: int) -> list[str]:
        """The shared tensors that are sent at the end of that round, in the order of `shapes`."""
        return _common(shapes, (part.exchanged(shapes, round_index) for part in self.parts))

    def taken(self, shapes: Shapes, round_index: int) -> list[str]:
        """The shared tensors that a node takes from the base as that round begins.

        A node goes on with its own of the others, if it was in the round before; else it takes all.
        """
        if round_index == 0:
            return list(shapes)
        source = round_index - 1 - self._wait_rounds
        return self.exchanged(shapes, source) if source >= 0 else []

    @property
    def _wait_rounds(self) -> int:
        return max((part.wait_rounds() for part in self.parts), default=0)

    @property
    def _averages(self) -> bool:
        return any(changes(part, "averages") for part in self.parts)

    def exchanged_before(self, shapes: Shapes, round_index: int) -> set[str]:
        """The shared tensors that some round before that one has exchanged."""
        rounds = range(max(0, round_index - self.period), round_index)
        return {name for earlier in rounds for name in self.exchanged(shapes, earlier)}

    # At the node.

    def optimizer(self, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The part's local optimizer, if one of them has its own."""
        for part in self.parts:
            given = part.optimizer(given)
        return given

    def start(self, name: str, own: Tensor, base: Tensor) -> Tensor:
        """What a node begins with in the place of a tensor that it takes from the base."""
        for part in self.parts:
            base = part.start(name, own, base)
        return base

    def remembers(self, federation: FederationConfig) -> list[str]:
        """Kinds of tensors that a node has from one round for the start of the next."""
        return [kind for part in self.parts for kind in part.remembers(federation)]

    @property
    def goes_ahead(self) -> bool:
        """Whether there is a part by which nodes may begin ahead of the base."""
        return any(changes(part, "ahead") for part in self.parts)

    def ahead(self, base: Tensor, remembered: Mapping[str, Tensor], federation: FederationConfig, nodes: int) -> Tensor:
        """What a node that remembers begins with in the place of a weight."""
        for part in self.parts:
            base = part.ahead(base, remembered, federation, nodes)
        return base

    def corrector(self, model: nn.Module, base: Mapping[str, Tensor]) -> Callable[[], None] | None:
        """What changes the gradients of each local step of a round that begins from `base`; None if nothing does."""
        parts = [part for part in self.parts if changes(part, "correct")]
        if not parts:
            return None
        weights = dict(model.named_parameters())
        near = {name: base[name].to(weight.device) for name, weight in weights.items()}

        def correct() -> None:
            for part in parts:
                part.correct(weights, near)

        return correct

    # At the Aggregator.

    def federation(self, federation: FederationConfig, moment: Moment) -> FederationConfig:
        """The options that hold in the round that begins. No round goes beyond the end of the run."""
        for part in self.parts:
            federation = part.federation(federation, moment)
        left = moment.total_steps - moment.sequential_step
        return federation if federation.tau <= left else federation.model_copy(update={"tau": max(1, left)})

    def least_rounds(self, federation: FederationConfig) -> int:
        """In how few rounds the run may be over."""
        return min((part.least_rounds(federation) for part in self.parts), default=federation.rounds)

    @property
    def finds_tau(self) -> bool:
        """Whether tau, and so the end of the run, is found as the run goes."""
        return any(changes(part, "least_rounds") for part in self.parts)

    def averages(self, moment: Moment) -> bool:
        """Whether the outer step of the round that begins is plain averaging."""
        return any(part.averages(moment) for part in self.parts)

    @property
    def holds_back(self) -> bool:
        """Whether outer steps are taken a round later: a part says so, or nodes wait longer for what they exchange, so
        that they miss nothing and can be told early what comes next."""
        waits = self._wait_rounds > 0 and not self.shared_state and not self._averages
        return waits or any(part.holds_back() for part in self.parts)

    def moved(self, shapes: Shapes, round_index: int, is_last: bool) -> list[str]:
        """The shared tensors that the outer step at the end of that round moves, in the order of `shapes`; `is_last`:
        of the run's last round, which holds nothing back."""
        exchanged = self.exchanged(shapes, round_index)
        if not (self.holds_back and self.is_partial):
            return exchanged
        held = self.exchanged(shapes, round_index - 1) if round_index else []
        names = {*held, *(exchanged if is_last else ())}
        return [name for name in shapes if name in names]

    def knows_next(self, federation: FederationConfig) -> bool:
        """Whether all of the next round's tasks is known when a round begins: base, tau and place in the run."""
        return self.holds_back and not self.finds_tau and federation.balance == "none"

    @property
    def late_rounds(self) -> int:
        """For how many rounds after its own the update of a node that still trains may count; 0: it is abandoned."""
        return max((part.late_rounds() for part in self.parts), default=0)

    def late_weight(self, weight: int, age: int) -> int:
        """The weight of an update that comes `age` rounds after its own."""
        for part in self.parts:
            weight = part.late_weight(weight, age)
        return weight

    @property
    def merged(self) -> Callable[[Updates], Iterator[tuple[str, Tensor]]] | None:
        """How updates are merged; None for the weighted mean, which needs none of them to be kept."""
        return next((part.merged for part in self.parts if changes(part, "merged")), None)


def is_state(name: str) -> bool:
    """Whether a shared tensor is optimizer state, not a weight."""
    return STATE_MARK in name


def _common(shapes: Shapes, selections: Iterable[Iterable[str]]) -> list[str]:
    names = set(shapes)
    for selection in selections:
        names &= set(selection)
    return [name for name in shapes if name in names]
