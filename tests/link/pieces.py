"""For tests of files that arrive in pieces."""

from __future__ import annotations

import hashlib
import random

from photon.link.partial import PartialFile


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fill(file: PartialFile, data: bytes, piece_bytes: int = 100_000) -> None:
    """Write everything that is missing, part after part."""
    for index, ((low, high), done) in enumerate(zip(file.bounds, file.done(), strict=True)):
        for begin in range(low + done, high, piece_bytes):
            file.write(index, begin, data[begin : min(high, begin + piece_bytes)])
