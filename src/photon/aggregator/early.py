"""The tasks of the next round, told while this one goes on: nodes that are done begin them, and communication hides.

Where outer steps are taken a round late (`Part.holds_back`) the base of round t + 1 does not wait for the updates of
round t: it is known when round t begins. A node that is told it downloads it while it trains, and trains on while its
update of round t travels, is merged and is committed. When round t + 1 is given, its work is half done.

What is told early is a forecast, and nothing rests on it. The outer step is taken at the end of the round as always; a
node that is then asked for other work than it began drops what it has. So a forecast may be wrong (a node went away, an
operator has readmitted another), and a run with forecasts ends in the same model as one without.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass

from photon.aggregator.downlink import Downlink, Told
from photon.aggregator.outer import OuterOptimizer
from photon.aggregator.state import RoundStore
from photon.link.body import Body
from photon.link.tensors import sha256_of_chunks, streamed_chunks, writing_order


@dataclass(frozen=True)
class Foreseen:
    """A base that is not the current one yet: its sha256, how it is told, and its body where that is all of it."""

    sha256: str
    downlink: Downlink
    body: Body

    def tell(self, node: str) -> Told:
        """How to tell it to a node that holds the base before."""
        return self.downlink.tell(node, self.body, self.sha256, is_untrained=False)


@dataclass(frozen=True)
class Present:
    """The base that a round begins from, and who will hold it at its end."""

    base: Body
    sha256: str
    nodes: Collection[str]


def foresee(
    outer: OuterOptimizer, downlink: Downlink, store: RoundStore, now: Present, seed: str, moved: Collection[str]
) -> Foreseen:
    """The base after `now`, to the last bit as the end of the round makes it: `seed` and `moved` are as given there.

    With a downlink that is not exact what moves is in memory meanwhile, once more, and then what tells it. Raises
    StateError if the disk does not take it.
    """
    weights = outer.weights()
    order = writing_order({name: weight.dtype for name, weight in weights.items()})
    if downlink.is_exact:
        body, sha256 = store.forecast(streamed_chunks(weights, ((name, outer.foreseen(name)) for name in order)))
        return Foreseen(sha256, downlink, body)
    later = copy(downlink)  # `advance` gives it other tensors, and changes none but those that it is told have moved
    later.holders = dict.fromkeys(now.nodes, now.sha256)
    foreseen = {name: outer.foreseen(name) if name in moved else weight for name, weight in weights.items()}
    tensors = later.advance(foreseen, now.base, now.sha256, seed, moved)
    return Foreseen(sha256_of_chunks(streamed_chunks(weights, tensors)), later, b"")
