"""Exchange the model in fragments, one a round: Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512).

Round r exchanges fragment `r mod count`; nodes train on with weights of their own of the others. So each weight is
exchanged every `count` rounds, and a round carries about 1/count of the model, both ways. A round's `federation.tau`
is the steps between two fragments; the paper's H, between two exchanges of one weight, is `count` times that. The
pseudo-gradient of a fragment is its last merged value less what the node has of it now; its outer momentum steps when
it is exchanged, and only then.

With `delay` nodes begin round r + 1 + delay, not r + 1, with what came of round r, and mix it: `mix * own + (1 - mix) *
merged`. So nobody misses anything if the outer step along a round's updates is taken at the end of the next round, and
it is: the base of round r + 1 is then known when round r begins, and between machines nodes are told of it and train on
while their fragment travels and is merged (`photon.aggregator.early`). A second round of delay hides no more. With
shared optimizer state, or while a part has the outer optimizer average, steps are taken at once and nothing overlaps.
An outer step takes the outer rate and momentum of the round in which it is taken.

What is evaluated, exported and at the end of the run the model is what was merged last of each fragment, as in the
paper; of fragment f that lacks what nodes learnt in the rounds since, fewer than `count`, at the end of the learning
rate's decay. With a delay the model of a round before the last also lacks what was exchanged last. A last
round that exchanges everything is no way out. It would carry the whole model over a link that was chosen for a fragment
of it, and the outer momentum, which is that of `count` rounds, would move weights nearly as far again for the work of
one.

A node that comes late, or has missed a round, takes the whole base; with a delay above 1 that has merges which others
take, and it too mixes in once more, a little later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from photon.errors import ConfigError
from photon.parts.base import Part, Shapes

_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?|h)\.(\d+)\.")  # ours, and those of Hugging Face


@dataclass(frozen=True)
class Fragments(Part):
    """`count` fragments; what is exchanged is taken `delay` rounds later, and mixed with the node's own if above 0."""

    count: int = 4
    delay: int = 0
    mix: float = 0.5
    layout: Literal["strided", "sequential"] = "strided"

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.delay < self.count:
            raise ValueError("fragments: count is at least 1, and delay from 0 to below count")
        if not 0 <= self.mix < 1:
            raise ValueError("fragments: mix, the share of a node's own weights, is from 0 to below 1")

    def exchanged(self, shapes: Shapes, round_index: int) -> Iterable[str]:
        """The fragment whose turn it is, with the optimizer state that is shared of its weights."""
        fragment = fragments_of(shapes, self.count, self.layout)
        return [name for name in shapes if fragment[weight_of(name)] == round_index % self.count]

    def wait_rounds(self) -> int:
        """The delay."""
        return self.delay

    def period(self) -> int:
        """Each fragment has its turn once."""
        return self.count

    def is_partial(self) -> bool:
        """With more than one fragment."""
        return self.count > 1

    def keeps_weights(self) -> bool:
        """With more than one fragment."""
        return self.count > 1

    def start(self, name: str, own: Tensor, base: Tensor) -> Tensor:
        """Without delay the base; with one, a mixture, which of equal tensors is the same to the last bit."""
        return torch.lerp(base, own, self.mix) if self.delay else base


def weight_of(name: str) -> str:
    """The weight that a shared tensor is, or belongs to as optimizer state."""
    return name.partition("/")[0]


def fragments_of(shapes: Shapes, count: int, layout: str) -> dict[str, int]:
    """The fragment of each weight, by names and shapes alone.

    A transformer block stays whole. Strided, block i goes to fragment `i mod count`; sequential, neighbours stay
    together. Embeddings, head and norms outside the blocks go one by one, the largest first, to the fragment that has
    fewest values. Raises ConfigError if a fragment would be left with nothing.
    """
    values = {name: prod(shape) for name, shape in shapes.items() if name == weight_of(name)}
    block = {name: int(found[1]) for name in values if (found := _BLOCK.search(name))}
    order = sorted(set(block.values()))
    place = {
        number: index % count if layout == "strided" else index * count // len(order)
        for index, number in enumerate(order)
    }
    fragment = {name: place[number] for name, number in block.items()}
    held = [sum(values[name] for name, own in fragment.items() if own == index) for index in range(count)]
    for name in sorted(values.keys() - block.keys(), key=lambda name: (-values[name], name)):
        fragment[name] = held.index(min(held))
        held[fragment[name]] += values[name]
    if empty := held.count(0):
        raise ConfigError(
            f"federation.parts: {count} fragments are too many: the model's {len(order)} blocks and "
            f"{len(values) - len(block)} tensors outside them leave {empty} of them with nothing"
        )
    return fragment


PART = Fragments
