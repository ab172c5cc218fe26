"""Bodies of messages: bytes in memory, or a stretch of a file that is read piece by piece.

A model-sized body that came over a network lies in a file. Nobody need hold it whole: the Aggregator reads one tensor
at a time, a node's upload one piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from photon.errors import WireError

PIECE_BYTES = 2**20


@dataclass(frozen=True)
class FileBody:
    """`size` bytes of the file at `path`, from byte `offset` on. The file must not change while it is used."""

    path: Path
    offset: int
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes `begin` to `end` of the body, as memory of their own. Raises WireError if the file is too short."""
        if not 0 <= begin <= end <= self.size:
            raise WireError(f"bytes {begin} to {end} were asked of a body of {self.size}")
        buffer = bytearray(end - begin)
        view = memoryview(buffer)
        with self.path.open("rb", buffering=0) as file:
            filled = 0
            while filled < len(buffer):
                count = os.preadv(file.fileno(), [view[filled:]], self.offset + begin + filled)
                if count == 0:
                    raise WireError(f"{self.path} ends before byte {self.offset + end}")
                filled += count
        return view

    def chunks(self, size: int = PIECE_BYTES) -> Iterator[memoryview]:
        """The body in pieces of at most `size` bytes; a piece is overwritten by the next."""
        buffer = memoryview(bytearray(min(size, max(1, self.size))))
        with self.path.open("rb", buffering=0) as file:
            done = 0
            while done < self.size:
                count = os.preadv(file.fileno(), [buffer[: min(len(buffer), self.size - done)]], self.offset + done)
                if count == 0:
                    raise WireError(f"{self.path} ends before byte {self.offset + self.size}")
                yield buffer[:count]
                done += count


Body = bytes | bytearray | memoryview | FileBody


def whole_file(path: Path) -> FileBody:
    """All of a file. Raises OSError if it is not there."""
    return FileBody(path, 0, path.stat().st_size)


def pieces(body: Body, size: int = PIECE_BYTES) -> Iterator[memoryview]:
    """Any body in pieces; of a body in memory they are views, of a file each is overwritten by the next."""
    if isinstance(body, FileBody):
        yield from body.chunks(size)
        return
    view = memoryview(body).cast("B")
    for begin in range(0, len(view), size):
        yield view[begin : begin + size]


def read_body(body: Body, begin: int, end: int) -> memoryview:
    """Bytes `begin` to `end`: a view of a body in memory, memory of their own for one in a file."""
    return body.read(begin, end) if isinstance(body, FileBody) else memoryview(body).cast("B")[begin:end]
