"""Who takes part in a round: a pure function of (seed, round, names), so nothing has to be stored or replayed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from photon.config import Recipe

DROPPED_OUT = "dropped out (federation.dropout)"  # the reason on record
_DRAW_BITS = 64


@dataclass(frozen=True)
class Draw:
    """Who is asked to train in a round, spares last; who dropped out, with the reason; and K of those that are left."""

    asked: list[str]
    dropped: dict[str, str]
    nodes: int


def draw_round(recipe: Recipe, round_index: int, names: Sequence[str], count: int) -> Draw:
    """The round's draw among the trainers `names`, K being `count`: sampled, then thinned by `federation.dropout`.

    K shrinks by as many as drop-outs leave too few: spares (`federation.oversample`) stand in for them as far as they
    go. A trainer that is not among `names` at all does not lower K.
    """
    federation = recipe.federation
    sampled = sample_with_spares(recipe.seed, round_index, names, count, federation.oversample)
    dropped = drop_outs(recipe.seed, round_index, sampled, federation.dropout)
    asked = [name for name in sampled if name not in dropped]
    too_few = max(0, min(count, len(sampled)) - len(asked))
    return Draw(asked, dict.fromkeys(dropped, DROPPED_OUT), count - too_few)


def drop_outs(seed: int, round_index: int, sampled: Sequence[str], dropout: float) -> list[str]:
    """Those of `sampled` that drop out, sorted: each with probability `dropout`, whoever else was sampled.

    Each name draws a number in [0, 1) from a hash of (seed, round, name) that has nothing to do with the one that
    samples, and drops out below `dropout`. So who is missing at 0.25 is missing at 0.5 too. If all would, the largest
    draw stays, the last to go as `dropout` grows: a round needs an update.
    """

    def draw(name: str) -> int:
        digest = hashlib.blake2b(
            f"{seed}/{round_index}/{name}".encode(), digest_size=_DRAW_BITS // 8, person=b"photon dropout"
        ).digest()
        return int.from_bytes(digest)

    stays = max(sampled, key=draw, default=None)
    threshold = Fraction(str(dropout)) * 2**_DRAW_BITS
    return sorted(name for name in sampled if name != stays and draw(name) < threshold)


def sample_nodes(seed: int, round_index: int, names: Sequence[str], count: int) -> list[str]:
    """`count` distinct names, uniformly, sorted; all of them if there are no more than that.

    Each name draws a number from a hash of (seed, round, name) and the smallest win, so a node's draw does not
    depend on who else is registered or in which order.
    """

    def draw(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}/{round_index}/{name}".encode(), digest_size=16).digest()

    return sorted(sorted(set(names), key=draw)[:count])


def sample_with_spares(seed: int, round_index: int, names: Sequence[str], count: int, oversample: float) -> list[str]:
    """`sample_nodes`, then, as far as there are names, `oversample * count` more (rounded up), the next in the draw.

    The spares come last: where nodes queue for a device, they begin last, so that an order of names favours nobody.
    """
    first = sample_nodes(seed, round_index, names, count)
    asked = math.ceil((1 + Fraction(str(oversample))) * count)
    return first + [name for name in sample_nodes(seed, round_index, names, asked) if name not in first]
