"""Who takes part in a round: a pure function of (seed, round, names), so nothing has to be stored or replayed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction


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
