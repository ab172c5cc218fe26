"""How numbers and foreign text are written for people: the same words in the terminal and in the report."""

from __future__ import annotations

import math
import unicodedata

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# These turn the direction of the text around them: a name could be made to look like another.
_TURNERS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSHOWABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))


def significant(value: float, digits: int = 3) -> str:
    """`value` to so many significant digits, never in exponent form below a million: 5.02, 151, 4081, 0.0312."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 1e6:
        return f"{value:.{digits - 1}e}"
    # The exponent is read off the rounded number: 9.996 has one digit more before the point than it seems.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def count(value: float) -> str:
    """A number of things, three digits and a decimal scale: 112, 1.03M, 8.40k, 2.30B (as parameters are counted)."""
    return _scaled(value, "", "").replace("G", "B")


def byte_size(size_bytes: float) -> str:
    """Bytes in decimal units, as links are sold: 512 B, 42.1 MB (a MB is 10^6 bytes)."""
    return _scaled(size_bytes, " ", "B")


def _scaled(number_of_things: float, gap: str, unit: str) -> str:
    value = float(number_of_things)
    for scale, letter in _SCALES:
        # The scale is chosen after rounding: 999,999 is 1.00M, not 1000k.
        if math.isfinite(value) and abs(value) >= 0.9995 * scale:
            return f"{significant(value / scale)}{gap}{letter}{unit}"
    number = f"{value:.0f}" if value.is_integer() else significant(value)
    return f"{number}{gap}{unit}"


def duration(seconds: float) -> str:
    """A span of time as minutes:seconds, with hours and days as needed: 0:07, 1:05, 2:03:04, 3 d 04:05:06."""
    if not math.isfinite(seconds):
        return f"{seconds:g}"
    whole = max(0, round(seconds))
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}:{secs:02}"
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def printable(text: str) -> str:
    """Text from a model or another site, safe to show: what could steer a terminal or break UTF-8 becomes U+FFFD.

    Newlines and tabs stay. Escape sequences, lone surrogates and direction overrides do not.
    """
    return "".join(c if c in "\n\t" or not _steers(c) else "\ufffd" for c in text)


def one_line(text: str, width: int = 120) -> str:
    """`printable` text folded into one line of at most `width` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _steers(character: str) -> bool:
    return character in _TURNERS or unicodedata.category(character) in _UNSHOWABLE
