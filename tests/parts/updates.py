"""Updates as lists, lies among them, and a whole round whose merge is done again by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.support import Federation, Network, edited, on_time, tampering, tiny_recipe, weights
from torch import Tensor

from photon.fabric.base import Arrival
from photon.link.tensors import encode_tensors
from photon.link.update import decode_message, expect_reply
from photon.parts.base import Part, Updates

Model = dict[str, Tensor]
Rule = Callable[[np.ndarray, Sequence[int]], np.ndarray]  # float64 [K, values] and weights to [values]
NODES = ("ada", "bob", "cyd", "dan", "eve", "fay", "gus")
SHAPES = {"w": (9, 20), "b": (20,), "scalar": (), "none": (0, 3), "b/exp_avg": (20,)}


class Listed:
    """Implements `Updates`."""

    def __init__(self, updates: Sequence[Model], weights: Sequence[int] | None = None) -> None:
        self.updates, self.weights = list(updates), list(weights or [1] * len(updates))

    def read(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """As they lie."""
        return iter(self.updates[index].items())


def honest(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Model]:
    """Updates that have something in common, as those of nodes have."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Model:
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}

    common = draw()
    return [{name: (common[name] + own).to(dtype) for name, own in draw().items()} for _ in range(count)]


def lying(update: Model, scale: float = -1000.0) -> Model:
    """What a liar makes of it."""
    return {name: scale * tensor for name, tensor in update.items()}


def flat(update: Model) -> np.ndarray:
    """All values as one float64 vector, by name."""
    return np.concatenate([update[name].double().numpy().reshape(-1) for name in sorted(update)])


def stacked(updates: Sequence[Model]) -> np.ndarray:
    """Float64 [K, values]."""
    return np.stack([flat(update) for update in updates])


def mean(rows: np.ndarray, weights: Sequence[int]) -> np.ndarray:
    """The mutant of every robust merge: what the merge would be without it."""
    return np.average(rows, axis=0, weights=weights)


def plain_mean(rows: np.ndarray, weights: Sequence[int]) -> np.ndarray:
    """The mean in which everybody has one voice."""
    return rows.mean(0)


def merged(part: Part, updates: Updates) -> np.ndarray:
    """What the part makes of them, flat."""
    return flat(dict(part.merged(updates)))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest."""
    return float(np.abs(ours - theirs).max())


def one_round(
    folder: Path, part: str, rule: Rule, count: int = 5, liars: int = 0, **sections: Any
) -> tuple[np.ndarray, np.ndarray, list[Model]]:
    """A round of a real federation: what it changed in the model, what `rule` makes of the updates, and these.

    The last `liars` nodes lie. Nodes train different numbers of tokens.
    """
    silos = {name: {"batch_size": 1 + index % 3} for index, name in enumerate(NODES[:count])}
    federation = {"rounds": 1, "parts": [part, *sections.pop("parts", [])], "norm_bound": False}
    recipe = tiny_recipe(silos, federation=federation | sections.pop("federation", {}), **sections)
    network = on_time
    for name in NODES[count - liars : count]:
        network = _both(network, tampering(name, lambda message: edited(message, lying)))
    run = Federation(folder, recipe, network, dtype=torch.float64)
    before = weights(run.aggregator.state())
    after = weights(run.run())
    first = {}  # by node: its update, and the tokens behind it
    for node, data in run.fabric.received:
        message = decode_message(data)
        if (report := expect_reply(message).training) is not None:
            first[node] = (dict(run.aggregator.reader.read(message, before)), report.tokens)
    assert sorted(first) == sorted(NODES[:count])
    updates = [first[node][0] for node in sorted(first)]
    uniform = recipe.federation.weighting == "uniform"
    tokens = [1 if uniform else first[node][1] for node in sorted(first)]
    moved = flat({name: before[name] - after[name] for name in before})
    return moved, rule(stacked(updates), tokens), updates


def in_every_order(folder: Path, part: str, count: int = 4, **sections: Any) -> set[bytes]:
    """The models after two rounds whose updates arrive in different orders: as many as there are different ones."""
    recipe = tiny_recipe(NODES[:count], federation={"parts": [part]} | sections.pop("federation", {}), **sections)
    models = set()
    for index, order in enumerate(list(itertools.permutations(NODES[:count]))[::5]):

        def network(arrivals: list[Arrival], order: tuple[str, ...] = order) -> list[tuple[float, Any]]:
            return [(float(order.index(arrival.node)), arrival) for arrival in arrivals]

        models.add(encode_tensors(weights(Federation(folder / str(index), recipe, network).run())))
    return models


def _both(first: Network, second: Network) -> Network:
    def network(arrivals: list[Arrival]) -> list[tuple[float, Any]]:
        return second([event for _, event in first(arrivals) if isinstance(event, Arrival)])

    return network
