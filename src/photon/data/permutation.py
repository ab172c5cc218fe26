"""A shuffle without a table: a keyed bijection of [0, size) evaluated only where it is asked.

A Feistel network on the smallest square grid that holds `size` points, and cycle walking for the few points outside
(J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, method 3). State and memory are zero at
any corpus size. It is a statistical shuffle, not a cipher.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def permute(index: NDArray[np.int64] | int, size: int, key: int) -> NDArray[np.int64]:
    """Where each `index` in [0, size) goes under the permutation named by the 64-bit `key`.

    Returns int64 of the shape of `index`; distinct indices give distinct results. ValueError outside the range.
    """
    values = np.asarray(index, dtype=np.int64)
    if values.size and (int(values.min()) < 0 or int(values.max()) >= size):
        raise ValueError(f"index outside [0, {size})")
    side = math.isqrt(size - 1) + 1 if size > 0 else 1
    keys = [_mix_int((key + (turn + 1) * _GOLDEN) & _MASK) for turn in range(_ROUNDS)]
    out = _network(values.astype(np.uint64).ravel(), side, keys)
    # Fewer than 2 * side points of the grid lie outside: walking on is rare, and ends inside.
    while (outside := out >= size).any():
        out[outside] = _network(out[outside], side, keys)
    return out.astype(np.int64).reshape(values.shape)


def _network(values: NDArray[np.uint64], side: int, keys: list[int]) -> NDArray[np.uint64]:
    """The Feistel rounds: a bijection of [0, side * side)."""
    high, low = np.divmod(values, np.uint64(side))
    for key in keys:
        low, high = high, (low + _mix(high + np.uint64(key))) % np.uint64(side)
    return high * np.uint64(side) + low


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 on 32 of its bits, so that adding to it cannot overflow."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values >> np.uint64(32)


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
