"""Stream: a node's endless sequence of training batches, a pure function of (seed, node, position).

Nothing is carried along but the position, the number of sequences consumed. So a stream resumes exactly from an
integer, and is the same however it is cut into batches, micro-batches or workers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from photon.data.permutation import permute
from photon.data.shards import ShardReader
from photon.errors import DataError

CYCLE_LIMIT = 1 << 16


class Stream:
    """The training sequences of one node: its sources mixed by weight, each shuffled anew every epoch.

    Mixing: a fixed cycle of at most `CYCLE_LIMIT` places names the source of every position, spread evenly. Weights
    whose ratio has so small a common denominator (0.7 : 0.3 has ten) are met exactly, others to 1 in 65,536; at
    every position a source is off its share by less than one sequence per source. A source of weight 0 is not read.
    Within an epoch of a source, its every sequence comes once, in an order of its own.
    """

    def __init__(
        self,
        sources: Sequence[ShardReader],
        weights: Sequence[float] | None,
        sequence_length: int,
        seed: int,
        node: str,
    ) -> None:
        """`weights` per source, by default their numbers of sequences; DataError for a source without a sequence."""
        if weights is not None and len(weights) != len(sources):
            raise DataError(f"silo {node}: {len(weights)} weights for {len(sources)} sources")
        self._sources = list(sources)
        self._length = sequence_length
        self._seed = seed
        self._node = node
        sizes = [source.train_sequences(sequence_length) for source in sources]
        for source, size in zip(sources, sizes, strict=True):
            if not size:
                raise DataError(
                    f"{source.folder}: {source.manifest.train.tokens} training tokens hold no sequence of "
                    f"{sequence_length}; add text or lower data.sequence_length"
                )
        self._sizes = np.array(sizes, dtype=np.int64)
        self._places = _places([Fraction(s) for s in sizes] if weights is None else [Fraction(str(w)) for w in weights])
        self._cycle = _cycle(self._places)
        # taken[i, s]: how many of a cycle's first i places are source s.
        marks = self._cycle[:, None] == np.arange(len(sizes))
        self._taken = np.concatenate([np.zeros((1, len(sizes)), np.int64), np.cumsum(marks, axis=0)])

    def batch(self, position: int, size: int) -> NDArray[np.int64]:
        """The `size` sequences after the first `position`: int64 [size, sequence_length + 1], inputs and targets."""
        cycles, places = np.divmod(np.arange(position, position + size, dtype=np.int64), len(self._cycle))
        chosen = self._cycle[places]
        out = np.empty((size, self._length + 1), dtype=np.int64)
        for source in np.unique(chosen):
            rows = np.flatnonzero(chosen == source)
            # How often the source came before each of these rows decides which of its sequences it is now.
            counts = cycles[rows] * self._places[source] + self._taken[places[rows], source]
            out[rows] = self._sources[source].read(self._sequences(int(source), counts), self._length)
        return out

    def counts(self, position: int) -> NDArray[np.int64]:
        """How many of the first `position` sequences came from each source: int64 [sources]."""
        cycles, place = divmod(position, len(self._cycle))
        counts: NDArray[np.int64] = cycles * self._places + self._taken[place]
        return counts

    def epoch(self, position: int) -> float:
        """How often the node's own text has been seen on average: sequences consumed per sequence there is."""
        return position / int(self._sizes[self._places > 0].sum())

    def _sequences(self, source: int, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The index of a source's sequence for each count: the count shuffled within its epoch."""
        size = int(self._sizes[source])
        epochs, ranks = np.divmod(counts, size)
        out = np.empty_like(counts)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            out[rows] = permute(ranks[rows], size, self._key(source, int(epoch)))
        return out

    def _key(self, source: int, epoch: int) -> int:
        """The 64-bit name of one epoch's order."""
        named = f"photon stream|{self._seed}|{self._node}|{source}|{epoch}"
        return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest())


def _places(weights: Sequence[Fraction]) -> NDArray[np.int64]:
    """How many places of a cycle each source gets: the weights as integers without common divisor, if small enough."""
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise DataError("the weights of a silo's sources must be >= 0 and not all zero")
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total > CYCLE_LIMIT:
        # Largest remainders, and at least one place for whatever is wanted at all.
        shares = [weight * CYCLE_LIMIT / total for weight in whole]
        places = [max(1, int(share)) if weight else 0 for weight, share in zip(whole, shares, strict=True)]
        by_remainder = sorted(range(len(whole)), key=lambda i: (places[i] - shares[i], i))
        for index in by_remainder[: max(0, CYCLE_LIMIT - sum(places))]:
            places[index] += 1
        whole = places
    return np.array(whole, dtype=np.int64)


def _cycle(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The source of each place: every source's j-th of r places as near to (j + 1/2) / r of the way as may be."""
    sources = np.repeat(np.arange(len(places)), places)
    when = np.concatenate([(np.arange(count) + 0.5) / count for count in places if count])
    return sources[np.argsort(when, kind="stable")].astype(np.int64)
