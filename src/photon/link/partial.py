"""A file that arrives in pieces: several parts at once, resumed after a kill, whole under its name or not at all.

Both ends use it, the gateway for an upload and a node for a download. Bytes are written at their place in
`NAME.partial`; how far each part has come stands in `NAME.progress`. A receiver that was killed goes on where that
says, and loses at most `SAVE_EVERY_BYTES`, or what came within `SAVE_EVERY_S` if that is more.

Nothing is synced: what arrives can be fetched again. A power cut may leave the progress ahead of the bytes: then the
sha256 of the whole, which is always checked, differs, and the file starts anew. It may also spoil a finished file: who
finds one by its name asks `photon.link.boot` first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Condition, Lock, Thread

from pydantic import BaseModel, ConfigDict, ValidationError

from photon.errors import PhotonError

MIN_PART_BYTES = 32 * 2**20
MAX_PARTS = 64
SAVE_EVERY_BYTES = 4 * 2**20
SAVE_EVERY_S = 0.25  # a fast line brings SAVE_EVERY_BYTES far more often than progress is worth writing down
_HASH_BURST_BYTES = 8 * 2**20
_PIECE_BYTES = 2**20


class PartialError(PhotonError):
    """A file that arrives in pieces cannot go on, or not as asked."""


class PartialBusyError(PartialError):
    """Another process or thread is receiving the same file."""


class OffsetError(PartialError):
    """A piece that does not begin where its part ends so far; `done` bytes of the part are here."""

    def __init__(self, text: str, done: int) -> None:
        super().__init__(text)
        self.done = done


class BeyondPartError(PartialError):
    """A piece that would reach beyond the end of its part."""


class IncompleteError(PartialError):
    """Not every part is whole yet."""


class HashMismatchError(PartialError):
    """All bytes are there, and they are the wrong ones."""


class _Progress(BaseModel):
    """What `NAME.progress` holds. `parts` are (begin, end, bytes done)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: str
    bytes: int
    parts: list[list[int]]


def part_bounds(size: int) -> list[tuple[int, int]]:
    """(begin, end) of the parts of a blob of `size` bytes: a function of the size alone, at most MAX_PARTS of them."""
    share = -(-size // MAX_PARTS)
    part_bytes = max(MIN_PART_BYTES, -(-share // _PIECE_BYTES) * _PIECE_BYTES)
    return [(begin, min(size, begin + part_bytes)) for begin in range(0, size, part_bytes)]


def replace_file(path: Path, text: str) -> None:
    """Replace a small file so that readers, and a kill, see the old text or the new. Not synced to the disk."""
    pending = path.with_name(f".pending-{path.name}-{secrets.token_hex(4)}")
    try:
        pending.write_text(text, encoding="utf-8")
        pending.replace(path)
    except OSError:
        pending.unlink(missing_ok=True)
        raise


class PartialFile:
    """The file `target` of `size` bytes with this `sha256`, while it arrives. Parts may be written by many threads.

    The disk holds at most `size` bytes and the memory a constant amount, whatever the size. The filled beginning is
    hashed while the rest arrives: by whoever writes the next piece of it, straight from memory, and by a thread where
    it has grown past what was hashed (another part came first, or an earlier process wrote it). `_is_hashing` says that
    somebody holds the digest: nobody else touches it, or `_hashed`. Raises PartialBusyError if somebody else is
    receiving this file, OSError.
    """

    def __init__(self, target: Path, sha256: str, size: int, bounds: Sequence[tuple[int, int]] | None = None) -> None:
        self.target, self.sha256, self.size = target, sha256, size
        self.bounds = tuple(part_bounds(size) if bounds is None else bounds)
        self._partial, self._sidecar = partial_names(target)
        self._done = [0] * len(self.bounds)
        self._unsaved_bytes, self._saved_at = 0, time.monotonic()
        self._lock = Lock()  # of the fields
        self._writing: set[int] = set()  # parts that a thread is writing; their bytes are not counted yet
        self._released = Condition(self._lock)  # told when a part is written, and when the digest is let go
        self._ending = Lock()  # of finish, close and discard; held as long as the rest takes to hash
        self._closed = self._finished = False
        self._digest, self._hashed = hashlib.sha256(), 0  # of the first `_hashed` bytes
        self._is_hashing = False  # somebody holds the digest
        self._file = self._open()
        try:
            self._resume()
        except BaseException:
            os.close(self._file)
            raise

    def done(self) -> list[int]:
        """Bytes that each part has, from its beginning."""
        with self._lock:
            return list(self._done)

    @property
    def complete(self) -> bool:
        """Whether every part is whole (not: whether the bytes are right)."""
        return sum(self.done()) == self.size

    @property
    def alive(self) -> bool:
        """Whether pieces can be written: neither finished, closed, nor removed by somebody else."""
        with self._lock:
            return not self._closed and os.fstat(self._file).st_nlink > 0

    def write(self, part: int, begin: int, data: bytes | bytearray | memoryview) -> None:
        """Add a piece that begins at byte `begin` of the whole file, which is where its part must end so far.

        `data` is of single bytes. Raises OffsetError, BeyondPartError, PartialError once the file is closed, OSError.
        """
        view, written = memoryview(data), 0
        with self._lock:
            while part in self._writing:
                self._released.wait()
            self._check_open()
            low, high = self.bounds[part]
            if begin != low + self._done[part]:
                raise OffsetError(
                    f"part {part} goes on at byte {low + self._done[part]}, not at {begin}", self._done[part]
                )
            if begin + len(view) > high:
                raise BeyondPartError(f"part {part} ends at byte {high}, {len(view)} bytes from {begin} reach beyond")
            self._writing.add(part)
        try:
            while written < len(view):
                written += os.pwrite(self._file, view[written:], begin + written)
        finally:
            self._take_in(part, begin, view[:written])

    def _take_in(self, part: int, begin: int, data: memoryview) -> None:
        """Take into account what was written, and hash it if it is what comes next."""
        with self._lock:
            # That all before it is hashed says that all before it is there.
            is_next = len(data) > 0 and not self._is_hashing and self._hashed == begin
            if not is_next:  # counted before the lock is let go: whoever holds the digest then sees that they are there
                self._count(part, len(data))
                return
            self._is_hashing = True
        self._digest.update(data)
        with self._lock:
            self._hashed += len(data)
            self._is_hashing = False
            self._count(part, len(data))

    def _count(self, part: int, written: int) -> None:
        """Let go of a part that was written."""
        self._writing.discard(part)
        self._released.notify_all()
        self._done[part] += written
        self._unsaved_bytes += written
        if written and not self._is_hashing and self._filled() - self._hashed >= _HASH_BURST_BYTES:
            Thread(target=self._hash_in_background, name="photon-hash", daemon=True).start()
            self._is_hashing = True  # only now: a thread that cannot start holds nothing
        if self._unsaved_bytes >= SAVE_EVERY_BYTES and time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self._save()

    def finish(self) -> None:
        """Check the sha256 and give the file its name; doing it again changes nothing.

        Raises IncompleteError if bytes are missing, HashMismatchError if they are wrong: then what came is removed.
        Raises OSError.
        """
        with self._ending:
            if self._finished:
                return
            with self._lock:
                self._check_open()
                missing = self.size - sum(self._done)
                if missing:
                    raise IncompleteError(f"{missing} of {self.size} bytes of {self.target.name} are missing")
                while self._is_hashing:
                    self._released.wait()  # bounded: all is there, and the hasher needs no more than to read it
                self._is_hashing = True
            self._hash_what_is_there()
            if self._digest.hexdigest() != self.sha256:
                self._close(save=False)
                self._remove()
                raise HashMismatchError(
                    f"{self.target.name} arrived with sha256 {self._digest.hexdigest()}, expected {self.sha256}"
                )
            self._partial.replace(self.target)
            self._close(save=False)
            self._sidecar.unlink(missing_ok=True)
            self._finished = True

    def close(self) -> None:
        """Stop here; the same file can be opened again and goes on exactly here."""
        with self._ending:
            self._close(save=True)

    def discard(self) -> None:
        """Stop, and remove what came so far; a finished file stays."""
        with self._ending:
            self._close(save=False)
            if not self._finished:
                self._remove()

    def _open(self) -> int:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have renamed the file: then this is no longer the partial file, but a good one.
            if os.fstat(handle).st_ino != self._partial.stat().st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(handle)
            raise PartialBusyError(f"{self._partial} is being received by another process") from None
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _resume(self) -> None:
        """Take up the progress in the sidecar if it is of this very file; else begin with an empty one."""
        try:
            progress = _Progress.model_validate_json(self._sidecar.read_bytes())
        except (FileNotFoundError, ValidationError):
            progress = None
        if progress is not None and (progress.sha256, progress.bytes) == (self.sha256, self.size):
            known = {(entry[0], entry[1]): entry[2] for entry in progress.parts if len(entry) == 3}
            done = [known.get(bounds, -1) for bounds in self.bounds]
            ends = [low + count for (low, _), count in zip(self.bounds, done, strict=True) if count]
            fits = all(0 <= count <= high - low for (low, high), count in zip(self.bounds, done, strict=True))
            if fits and os.fstat(self._file).st_size >= max(ends, default=0):
                self._done = done
                return
        self._sidecar.unlink(missing_ok=True)  # before the bytes: progress must never be ahead of them
        if os.fstat(self._file).st_size:  # of one that is empty not: ext4 would write out all of it when it is closed
            os.ftruncate(self._file, 0)

    def _check_open(self) -> None:
        if self._closed:
            raise PartialError(f"{self.target.name} is no longer being received here")

    def _save(self) -> None:
        parts = [[low, high, count] for (low, high), count in zip(self.bounds, self._done, strict=True)]
        replace_file(self._sidecar, json.dumps({"sha256": self.sha256, "bytes": self.size, "parts": parts}))
        self._unsaved_bytes, self._saved_at = 0, time.monotonic()

    def _filled(self) -> int:
        """Length of the beginning that has no gap."""
        for (low, high), count in zip(self.bounds, self._done, strict=True):
            if count < high - low:
                return low + count
        return self.size

    def _hash_in_background(self) -> None:
        with suppress(PartialError, OSError):  # `finish` hashes from here on, and meets the same error
            self._hash_what_is_there()

    def _hash_what_is_there(self) -> None:
        """Let the digest, which the caller holds, catch up with the filled beginning; then let it go.

        Ends as soon as it has, or the file is closed.
        """
        try:
            buffer = memoryview(bytearray(_PIECE_BYTES))
            while behind := self._bytes_behind():
                count = os.preadv(self._file, [buffer[: min(_PIECE_BYTES, behind)]], self._hashed)
                if count == 0:
                    raise PartialError(f"{self._partial} was cut short while it was received")
                self._digest.update(buffer[:count])
                self._hashed += count
        except BaseException:
            with self._lock:
                self._let_go()
            raise

    def _bytes_behind(self) -> int:
        """How far the digest is behind what is there; at 0 it is let go at once, so that the next piece can take it."""
        with self._lock:
            behind = 0 if self._closed else self._filled() - self._hashed
            if not behind:
                self._let_go()
            return behind

    def _let_go(self) -> None:
        self._is_hashing = False
        self._released.notify_all()

    def _close(self, save: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while self._writing or self._is_hashing:
                self._released.wait()  # bounded: by one write of each part, and one piece that is hashed
        try:
            if save and self._unsaved_bytes and os.fstat(self._file).st_nlink:
                self._save()
        finally:
            os.close(self._file)

    def _remove(self) -> None:
        self._sidecar.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)


def partial_names(target: Path) -> tuple[Path, Path]:
    """(bytes so far, progress): the two files that stand for `target` while it arrives."""
    return target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.progress")
