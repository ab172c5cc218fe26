"""Tuning for a comparison: which points of a method's grid are tried, which one won, and whether it lies at an edge.

Every method gets the same number of points. The first is the method as it stands; the others follow a fixed
low-discrepancy sequence over its grid, so that few points lie spread over all of it, and more points add to fewer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from photon.config import Recipe
from photon.errors import ConfigError, InputError
from photon.method import NO_SETTINGS, Method, Settings, option_value, setting_value
from photon.options import toml_text

_LEAST_WITH_EDGES = 3  # of two values each is an edge, which says nothing
_DRAWS_PER_CELL = 64  # then what is left of the grid follows in its order


@dataclass(frozen=True)
class Choice:
    """One value on an axis: what it comes to, and as it is written; `setting` None is the method as it stands."""

    value: object
    setting: object


@dataclass(frozen=True)
class Axis:
    """Options that move together, and their choices in order."""

    addresses: tuple[str, ...]
    choices: tuple[Choice, ...]

    @property
    def default(self) -> int:
        """Where the method stands."""
        return next(index for index, choice in enumerate(self.choices) if choice.setting is None)

    @property
    def has_ends(self) -> bool:
        """Whether there is a lowest and a highest choice: words and lists stand in the order of their file."""
        return _are_numbers(self.choices)


@dataclass(frozen=True)
class Point:
    """A point of the grid: `settings` are what differs from the method as it stands, `place` its index on each axis."""

    settings: Settings
    place: tuple[int, ...]

    def label(self, default: Recipe) -> str:
        """What differs, resolved: `node.lr = 0.005, federation.outer_lr = 0.5`; empty for the method as it stands."""
        values = {a: setting_value(default, a, s, default.nodes_per_round) for a, s in self.settings.items()}
        return ", ".join(f"{address} = {toml_text(value)}" for address, value in values.items() if value is not None)


def axes_of(method: Method, default: Recipe) -> list[Axis]:
    """The grid of a method around `default`, the recipe with the method laid over it."""
    axes = []
    for addresses, settings in method.tune.items():
        first = addresses[0]
        standing = option_value(default, first)
        if standing is None:
            raise ConfigError(
                f"{method.place}: [tune] {first}: the recipe leaves it unset, so nothing stands beside it"
            )
        found = {_plain(standing): Choice(standing, None)}
        for setting in settings:
            try:
                value = setting_value(default, first, setting, default.nodes_per_round)
            except ConfigError as error:
                raise ConfigError(f"{method.place}: [tune] {error}") from error
            found.setdefault(_plain(value), Choice(value, setting))
        choices = list(found.values())
        if _are_numbers(choices):
            choices.sort(key=lambda choice: float(str(choice.value)))
        axes.append(Axis(addresses, tuple(choices)))
    return axes


def points_of(method: Method, default: Recipe, count: int) -> list[Point]:
    """The first `count` points to try. Raises InputError if the method's grid has fewer."""
    axes = axes_of(method, default)
    size = math.prod(len(axis.choices) for axis in axes)
    if count > size:
        raise InputError(
            f"--tune {count}: the grid of method {method.name} has {size} point{'s' if size > 1 else ''}, and every "
            f"method gets the same number: ask for at most {size}, or give {method.name} a longer [tune]"
        )
    return [_point(axes, place) for place in itertools.islice(_places(axes), count)]


def winner_of(losses: Sequence[float | None]) -> int:
    """Index of the lowest loss, the first of equals; what failed or diverged cannot win over what did not."""
    scores = [loss if loss is not None and math.isfinite(loss) else math.inf for loss in losses]
    return scores.index(min(scores))


def edges_of(axes: Sequence[Axis], point: Point) -> list[str]:
    """The options, numbers all, for which the point lies at an end of its axis: a better value may lie beyond."""
    return [
        ", ".join(axis.addresses)
        for axis, index in zip(axes, point.place, strict=True)
        if axis.has_ends and len(axis.choices) >= _LEAST_WITH_EDGES and index in (0, len(axis.choices) - 1)
    ]


def _places(axes: Sequence[Axis]) -> Iterator[tuple[int, ...]]:
    """Every place of the grid once: the default, then by the sequence of Roberts (a lattice of the golden ratio's kin).

    On d axes the k-th draw is the fractional part of 1/2 + k / phi^j on axis j, with phi the root of x^(d + 1) = x + 1.
    """
    sizes = [len(axis.choices) for axis in axes]
    first = tuple(axis.default for axis in axes)
    seen = {first}
    yield first
    phi = 2.0
    for _ in range(60):
        phi = (1 + phi) ** (1 / (len(axes) + 1))
    for draw in range(1, _DRAWS_PER_CELL * math.prod(sizes)):
        place = tuple(int((0.5 + draw / phi ** (j + 1)) % 1 * size) for j, size in enumerate(sizes))
        if place not in seen:
            seen.add(place)
            yield place
    yield from (place for place in itertools.product(*map(range, sizes)) if place not in seen)


def _point(axes: Sequence[Axis], place: tuple[int, ...]) -> Point:
    chosen: dict[str, object] = {}
    for axis, index in zip(axes, place, strict=True):
        setting = axis.choices[index].setting
        if setting is not None:
            chosen |= dict.fromkeys(axis.addresses, setting)
    settings: Mapping[str, object] = chosen or NO_SETTINGS
    return Point(settings, place)


def _are_numbers(choices: Sequence[Choice]) -> bool:
    return all(isinstance(choice.value, int | float) for choice in choices)


def _plain(value: object) -> str:
    """Equal for 1 and 1.0."""
    return f"{value:.9g}" if isinstance(value, int | float) and not isinstance(value, bool) else toml_text(value)
