"""Who takes part in a round: a pure function of (seed, round, names), so nothing has to be stored or replayed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def sample_nodes(seed: int, round_index: int, names: Sequence[str], count: int) -> list[str]:
    """`count` distinct names, uniformly, sorted; all of them if there are no more than that.

    Each name draws a number from a hash of (seed, round, name) and the smallest win, so a node's draw does not
    depend on who else is registered or in which order.
    """

    def draw(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}/{round_index}/{name}".encode(), digest_size=16).digest()

    return sorted(sorted(set(names), key=draw)[:count])
