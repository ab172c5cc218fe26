"""Bandwidths and times as people write them: 1Gbps, 50ms."""

from __future__ import annotations

import re
from collections.abc import Mapping

from photon.errors import InputError
from photon.readable import one_line, significant

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BANDWIDTH = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kKmMgGtT]?)(bps|bit/s|b/s|B/s)")
_TIME = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(us|ms|s|min|h)")
_LEAST_BITS_PER_S, _MOST_BITS_PER_S, _MOST_S = 1.0, 1e15, 3.6e6
_SECONDS: Mapping[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def bandwidth_bits_per_s(text: str, option: str) -> float:
    """`10Mbps`, `1 Gbit/s`, `125MB/s` (bytes, the capital B). Raises InputError that names the option."""
    found = _BANDWIDTH.fullmatch(text.strip())
    bits = float("nan")
    if found:
        bits = _number(found[1]) * _SCALES[found[2].lower()] * (8.0 if found[3] == "B/s" else 1.0)
    if not _LEAST_BITS_PER_S <= bits <= _MOST_BITS_PER_S:
        raise InputError(
            f"{option} is a bandwidth such as 100Mbps, 1Gbit/s or 125MB/s, from 1bps to 1000Tbps, not {_short(text)}"
        )
    return bits


def time_s(text: str, option: str) -> float:
    """`50ms`, `2s`, `0s`. Raises InputError that names the option."""
    found = _TIME.fullmatch(text.strip())
    seconds = _number(found[1]) * _SECONDS[found[2]] if found else float("nan")
    if not 0 <= seconds <= _MOST_S:
        raise InputError(f"{option} is a time such as 50ms or 0.1s, at most 1000h, not {_short(text)}")
    return seconds


def bandwidth_text(bits_per_s: float) -> str:
    """`21.7 Gbit/s`."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if bits_per_s >= 0.9995 * scale:
            return f"{significant(bits_per_s / scale)} {letter}bit/s"
    return f"{significant(bits_per_s)} bit/s"


def time_text(seconds: float) -> str:
    """`83.1 ms`, `12.5 s`, `4.35 h`, `12.1 days`: three digits, for tables of numbers that differ by much."""
    for least, scale, unit in (
        (864_000.0, 86_400.0, "days"),
        (3600.0, 3600.0, "h"),
        (180.0, 60.0, "min"),
        (1.0, 1.0, "s"),
    ):
        if seconds >= least:
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds * 1000)} ms" if seconds > 0 else "0"


def _short(text: str) -> str:
    return repr(one_line(text, 60))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
