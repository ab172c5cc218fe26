"""Files that are there whole or not at all, and numbered folders of them with hashes.

The Aggregator keeps one such folder a round; each node keeps its own beside its text. A folder is written under a
temporary name, flushed to the disk and renamed: a crash at any instant leaves the old state or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from photon.errors import InputError, StateError

STATE_FILE = "state.json"
_PENDING = ".pending-"
_DIGITS = 6

Chunk = bytes | memoryview  # of single bytes, so that its length is its size


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` so that a reader or a crash sees the old content or the new, never a part."""
    pending = path.with_name(f"{_PENDING}{path.name}-{secrets.token_hex(4)}")
    try:
        _write_synced(pending, [data.encode() if isinstance(data, str) else data])
        pending.replace(path)
        sync_folder(path.parent)
    finally:
        pending.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mode_of(path: Path) -> int:
    """Kind and permissions of what is at `path`, for the `stat` module; 0 if nothing is.

    Raises OSError where that cannot be seen: `Path.is_file` of some versions takes it for absence.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


@contextmanager
def only_process(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path` for this process; it ends with the process. Raises InputError if another does."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        yield
    finally:
        os.close(handle)


class _FileEntry(BaseModel):
    """What a file of a state must be."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: int
    sha256: str


class _Manifest(BaseModel):
    """`state.json`: a state's fields, its files, and a hash over both."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    number: int
    fields: dict[str, Any]
    files: dict[str, _FileEntry]
    sha256: str

    def own_sha256(self) -> str:
        """Of everything but itself, in canonical JSON."""
        text = json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Draft:
    """A file that is written and flushed, and belongs to no state yet: `NumberedStates.commit` takes it over."""

    path: Path
    entry: _FileEntry

    @property
    def sha256(self) -> str:
        """Of its bytes."""
        return self.entry.sha256


@dataclass(frozen=True)
class Committed:
    """One numbered state whose manifest was verified: its fields and the folder its files are in."""

    number: int
    folder: Path
    fields: dict[str, Any]
    entries: Mapping[str, _FileEntry]

    @property
    def sha256(self) -> dict[str, str]:
        """What each file of this state must be."""
        return {name: entry.sha256 for name, entry in self.entries.items()}

    def read(self, name: str) -> bytes:
        """The bytes of a file of this state, these very bytes verified. Raises StateError if they are damaged."""
        path, expected = self.folder / name, self.entries[name]
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StateError(f"{path} is missing.") from None
        _compare(path, _FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()), expected)
        return data


class NumberedStates:
    """Folders `000000`, `000001`, ... under `root`, each committed whole, each with hashes of its files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def numbers(self) -> list[int]:
        """Numbers of all committed states, ascending. Leftovers of a crash are not among them."""
        if not self.root.is_dir():
            return []
        return sorted(
            int(entry.name) for entry in self.root.iterdir() if len(entry.name) >= _DIGITS and entry.name.isdecimal()
        )

    def folder(self, number: int) -> Path:
        """Where state `number` is or would be."""
        return self.root / f"{number:0{_DIGITS}d}"

    def pending(self, name: str) -> Path:
        """Where something that belongs to no state may lie until the next `prune`."""
        return self.root / f"{_PENDING}{name}"

    def draft(self, chunks: Iterable[Chunk]) -> Draft:
        """Write a file that is needed before the state that it will be part of; the next `prune` removes it.

        Raises StateError if the disk does not take it.
        """
        folder = self.root / f"{_PENDING}draft-{secrets.token_hex(4)}"
        with _whole_or_told(folder):
            folder.mkdir(parents=True)
            return Draft(folder / "file", _write_synced(folder / "file", chunks))

    def commit(
        self, number: int, files: Mapping[str, Iterable[Chunk] | Draft], fields: Mapping[str, Any]
    ) -> dict[str, str]:
        """Write state `number` (replacing one of that number), make it durable, and give the sha256 of each file.

        A file is given in chunks, so that what is large need never be in memory in one piece, or as a draft. Raises
        StateError if the disk does not take it: the states before are as they were.
        """
        pending = self.root / f"{_PENDING}{number:0{_DIGITS}d}-{secrets.token_hex(4)}"
        with _whole_or_told(pending):
            return self._commit(pending, number, files, fields)

    def _commit(
        self, pending: Path, number: int, files: Mapping[str, Iterable[Chunk] | Draft], fields: Mapping[str, Any]
    ) -> dict[str, str]:
        pending.mkdir(parents=True)
        entries = {}
        for name, chunks in files.items():
            if isinstance(chunks, Draft):
                chunks.path.rename(pending / name)
                entries[name] = chunks.entry
            else:
                entries[name] = _write_synced(pending / name, chunks)
        manifest = _Manifest(number=number, fields=dict(fields), files=entries, sha256="")
        manifest = manifest.model_copy(update={"sha256": manifest.own_sha256()})
        _write_synced(pending / STATE_FILE, [manifest.model_dump_json(indent=1).encode()])
        sync_folder(pending)
        final = self.folder(number)
        if final.exists():  # a repeated round: should we crash between the two renames, it is repeated once more
            final.rename(self.root / f"{_PENDING}old-{number}-{secrets.token_hex(4)}")
        pending.rename(final)
        sync_folder(self.root)
        return {name: entry.sha256 for name, entry in entries.items()}

    def load(self, number: int) -> Committed:
        """State `number`, every file checked against its hash. Raises StateError naming what is damaged."""
        committed = self.open(number)
        for name, expected in committed.entries.items():
            _verify(committed.folder / name, expected)
        return committed

    def open(self, number: int) -> Committed:
        """State `number` for who takes its files from `Committed.read`, which verifies them. Raises StateError."""
        manifest = self._manifest(number)
        return Committed(number, self.folder(number), manifest.fields, manifest.files)

    def fields(self, number: int) -> dict[str, Any]:
        """The fields of state `number` alone; its files are not looked at. Raises StateError if they are damaged."""
        return self._manifest(number).fields

    def _manifest(self, number: int) -> _Manifest:
        folder = self.folder(number)
        path = folder / STATE_FILE
        try:
            manifest = _Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise StateError(f"{folder} holds no {STATE_FILE}: there is no state {number}.") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise StateError(f"{path} is damaged: {'.'.join(map(str, first['loc']))} {first['msg']}.") from None
        if manifest.sha256 != manifest.own_sha256():
            raise StateError(f"{path} is damaged: its own sha256 differs.")
        if manifest.number != number:
            raise StateError(f"{path} says it is state {manifest.number}: the folder was renamed or copied.")
        return manifest

    def prune(self, keep: Iterable[int]) -> None:
        """Remove every state not in `keep`, and what crashes left behind."""
        kept = set(keep)
        for number in self.numbers():
            if number not in kept:  # rename first: a crash half-way through must not leave a state that looks damaged
                self.folder(number).rename(self.root / f"{_PENDING}old-{number}-{secrets.token_hex(4)}")
        for leftover in self.root.glob(f"{_PENDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def set_aside(self, after: int) -> None:
        """Rename states later than `after` out of the way, without destroying them."""
        for number in self.numbers():
            if number > after:
                folder = self.folder(number)
                folder.rename(folder.with_name(f"set-aside-{folder.name}-{secrets.token_hex(4)}"))


def kept_numbers(numbers: Iterable[int], keep_last: int, keep_every: int) -> set[int]:
    """The retention rule: the newest `keep_last`, and every `keep_every`-th (0 = none)."""
    ordered = sorted(numbers)
    return set(ordered[-keep_last:]) | {number for number in ordered if keep_every and number % keep_every == 0}


@contextmanager
def _whole_or_told(pending: Path) -> Iterator[None]:
    """Tells a failure of the disk as a StateError, and removes `pending`: what is left would fill the disk further."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(pending, ignore_errors=True)
        raise StateError(
            f"{pending.parent}: a state cannot be written there ({error.strerror or error}). "
            "Make room or mend the permissions, and go on: the states before are safe."
        ) from error


def _write_synced(path: Path, chunks: Iterable[Chunk]) -> _FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return _FileEntry(bytes=size, sha256=digest.hexdigest())


def _verify(path: Path, expected: _FileEntry) -> None:
    if not path.is_file():
        raise StateError(f"{path} is missing.")
    size = path.stat().st_size
    digest = expected.sha256
    if size == expected.bytes:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    _compare(path, _FileEntry(bytes=size, sha256=digest), expected)


def _compare(path: Path, found: _FileEntry, expected: _FileEntry) -> None:
    if found.bytes != expected.bytes:
        raise StateError(f"{path} has {found.bytes} bytes, its manifest says {expected.bytes}: it is damaged.")
    if found.sha256 != expected.sha256:
        raise StateError(f"{path} is damaged: its sha256 is {found.sha256}, its manifest says {expected.sha256}.")
