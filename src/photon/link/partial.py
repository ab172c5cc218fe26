"""A file that arrives in pieces: several parts at once, resumed after a kill, whole under its name or not at all.

Both ends use it, the gateway for an upload and a node for a download. Bytes are written at their place in
`NAME.partial`; how far each part has come stands in `NAME.progress`. A receiver that was killed goes on where that
says, and loses at most `SAVE_EVERY_BYTES`. A power cut may leave the progress ahead of the bytes: then the sha256 of
the whole, which is always checked, differs, and the file starts anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Condition, Lock, Thread

from pydantic import BaseModel, ConfigDict, ValidationError

from photon.errors import PhotonError

MIN_PART_BYTES = 32 * 2**20
MAX_PARTS = 64
SAVE_EVERY_BYTES = 4 * 2**20
_HASH_BURST_BYTES = 8 * 2**20
_SYNC_EVERY_BYTES = 64 * 2**20
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

    The disk holds at most `size` bytes and the memory a constant amount, whatever the size. A thread hashes the filled
    beginning while the rest arrives. Raises PartialBusyError if somebody else is receiving this file, OSError.
    """

    def __init__(self, target: Path, sha256: str, size: int, bounds: Sequence[tuple[int, int]] | None = None) -> None:
        self.target, self.sha256, self.size = target, sha256, size
        self.bounds = tuple(part_bounds(size) if bounds is None else bounds)
        self._partial, self._sidecar = partial_names(target)
        self._done = [0] * len(self.bounds)
        self._unsaved_bytes = 0
        self._lock = Lock()  # of the fields
        self._writing: set[int] = set()  # parts that a thread is writing; their bytes are not counted yet
        self._written = Condition(self._lock)
        self._ending = Lock()  # of finish, close and discard; held as long as the rest takes to hash
        self._closed = self._finished = False
        self._digest, self._hashed = hashlib.sha256(), 0
        self._hasher: Thread | None = None
        self._syncer: Thread | None = None
        self._sync_error: OSError | None = None
        self._unsynced_bytes = 0
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
        with self._lock:
            while part in self._writing:
                self._written.wait()
            self._check_open()
            low, high = self.bounds[part]
            if begin != low + self._done[part]:
                raise OffsetError(
                    f"part {part} goes on at byte {low + self._done[part]}, not at {begin}", self._done[part]
                )
            if begin + len(data) > high:
                raise BeyondPartError(f"part {part} ends at byte {high}, {len(data)} bytes from {begin} reach beyond")
            self._writing.add(part)
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._file, memoryview(data)[written:], begin + written)
        finally:
            with self._lock:
                self._writing.discard(part)
                self._written.notify_all()
                self._note(part, written)

    def _note(self, part: int, written: int) -> None:
        """Take into account what was written."""
        self._done[part] += written
        self._unsaved_bytes += written
        if self._unsaved_bytes >= SAVE_EVERY_BYTES:
            self._save()
        self._unsynced_bytes += written
        if self._unsynced_bytes >= _SYNC_EVERY_BYTES:
            self._sync_ahead()
        if written and self._hasher is None and self._filled() - self._hashed >= _HASH_BURST_BYTES:
            self._hasher = Thread(target=self._hash_ahead, name="photon-hash", daemon=True)
            self._hasher.start()

    def finish(self) -> None:
        """Check the sha256, sync, and give the file its name; doing it again changes nothing.

        Raises IncompleteError if bytes are missing. Raises HashMismatchError if they are wrong, and OSError if the disk
        has lost some: then what came is removed.
        """
        with self._ending:
            if self._finished:
                return
            with self._lock:
                self._check_open()
                missing = self.size - sum(self._done)
                if missing:
                    raise IncompleteError(f"{missing} of {self.size} bytes of {self.target.name} are missing")
                self._sync_ahead()  # while the rest is hashed
            self._join(self._hasher)
            self._hash_what_is_there()
            self._join(self._syncer)
            if self._digest.hexdigest() != self.sha256:
                self._close(save=False)
                self._remove()
                raise HashMismatchError(
                    f"{self.target.name} arrived with sha256 {self._digest.hexdigest()}, expected {self.sha256}"
                )
            if self._sync_error is None:
                self._sync(whole=True)
            if self._sync_error is not None:  # the kernel tells of it once: what came cannot be trusted from now on
                self._close(save=False)
                self._remove()
                raise self._sync_error
            self._partial.replace(self.target)
            _sync_folder(self.target.parent)
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
        os.ftruncate(self._file, 0)

    def _check_open(self) -> None:
        if self._closed:
            raise PartialError(f"{self.target.name} is no longer being received here")

    def _save(self) -> None:
        parts = [[low, high, count] for (low, high), count in zip(self.bounds, self._done, strict=True)]
        replace_file(self._sidecar, json.dumps({"sha256": self.sha256, "bytes": self.size, "parts": parts}))
        self._unsaved_bytes = 0

    def _filled(self) -> int:
        """Length of the beginning that has no gap."""
        for (low, high), count in zip(self.bounds, self._done, strict=True):
            if count < high - low:
                return low + count
        return self.size

    def _hash_ahead(self) -> None:
        with suppress(PartialError, OSError):  # `finish` hashes from here on, and meets the same error
            self._hash_what_is_there()

    def _hash_what_is_there(self) -> None:
        """Let the digest catch up with the filled beginning; ends as soon as it has, or the file is closed."""
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while True:
            with self._lock:
                filled = self._filled()
                if self._closed or self._hashed == filled:
                    self._hasher = None
                    return
            count = os.preadv(self._file, [buffer[: min(_PIECE_BYTES, filled - self._hashed)]], self._hashed)
            if count == 0:
                raise PartialError(f"{self._partial} was cut short while it was received")
            self._digest.update(buffer[:count])
            self._hashed += count

    def _sync_ahead(self) -> None:
        """Have the disk write what is here, so that little is left when the last byte is; in a thread of its own."""
        if self._syncer is None or not self._syncer.is_alive():
            self._unsynced_bytes = 0
            self._syncer = Thread(target=self._sync, name="photon-sync", daemon=True)
            self._syncer.start()

    def _sync(self, whole: bool = False) -> None:
        try:
            (os.fsync if whole else os.fdatasync)(self._file)
        except OSError as error:
            self._sync_error = error

    def _join(self, thread: Thread | None) -> None:
        """Wait for the hasher (for what is filled, or one piece once the file is closed) or syncer (for the disk)."""
        if thread is not None:
            thread.join()

    def _close(self, save: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while self._writing:
                self._written.wait()  # bounded: by one write of each part
        self._join(self._hasher)
        self._join(self._syncer)
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


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
