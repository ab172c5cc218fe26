"""Where model-sized bytes wait: bases that every node may read, uploads that only the Aggregator may read.

A round moves two kinds of blobs, both named by their sha256. Going down, a base or a tokenizer is published once and
downloaded by many nodes. Coming up, each node uploads one update, and only up to the size that its ticket allows: the
limit is known before the first byte, so a hostile node cannot fill the Aggregator's disk.

Two processes share a store: the round loop publishes, gives tickets, fetches and discards; the gateway locates, and
takes uploads in. Nodes see neither, only the `Location` of a blob: the parts that it moves in, and a URL for each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from threading import Lock
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from photon.errors import PhotonError
from photon.link.body import Body, FileBody, pieces, whole_file
from photon.link.boot import verify_after_boot
from photon.link.partial import (
    HashMismatchError,
    IncompleteError,
    PartialFile,
    part_bounds,
    partial_names,
    replace_file,
)

MAX_PARTS = 10_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class BlobError(PhotonError):
    """A blob cannot be stored, or is not what was asked for; the text names the blob and the place."""


class BlobRefusedError(BlobError):
    """What a node asked of the store is not granted: no ticket, or an expired one. `status` is what HTTP says of it."""

    status = 403


class BlobTooLargeError(BlobRefusedError):
    """An upload that is larger than its ticket allows."""

    status = 413


class BlobIncompleteError(BlobRefusedError):
    """An upload that was not begun, or whose bytes are not all here: the node begins it again, and goes on."""

    status = 409


class BlobDamagedError(BlobRefusedError):
    """An upload that is whole and not what its sha256 says; it was removed."""

    status = 422


class Part(BaseModel):
    """One piece of a blob that moves by itself: bytes `begin` up to `end` (exclusive) of the whole blob."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(max_length=8192, description="Absolute (presigned: used as it is), or a path at the gateway.")
    begin: int = Field(ge=0)
    end: int = Field(ge=0)
    done: int = Field(0, ge=0, description="Bytes of this part that the receiver of an upload already has.")

    @model_validator(mode="after")
    def _ordered(self) -> Part:
        if not self.done <= self.end - self.begin:
            raise ValueError(f"part {self.begin}-{self.end} cannot have {self.done} bytes done")
        return self


class Location(BaseModel):
    """Where a blob is read from or written to. The parts tile it: no gap, no overlap, in order.

    Down, a part is asked for with `Range` in offsets of the whole blob. Up, a part at the gateway is sent from `done`
    on with `Content-Range`; one behind an absolute URL is sent whole, without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    parts: Annotated[list[Part], Field(max_length=MAX_PARTS)]

    @model_validator(mode="after")
    def _tiled(self) -> Location:
        position = 0
        for part in self.parts:
            if part.begin != position:
                raise ValueError(f"a part begins at byte {part.begin}, expected {position}")
            position = part.end
        if position != self.bytes:
            raise ValueError(f"the parts cover {position} bytes of {self.bytes}")
        return self


class BlobStore(Protocol):
    """What the round loop and the gateway ask of a store. Every method may be called from any thread."""

    # The round loop's side.

    def publish(self, sha256: str, body: Body) -> None:
        """Let every node download `body`; whole or not at all, and doing it again changes nothing."""
        ...

    def retract(self, sha256: str) -> None:
        """Take a published blob back; nothing happens if it is not there."""
        ...

    def published(self) -> set[str]:
        """The sha256 of every published blob."""
        ...

    def allow(self, node: str, max_bytes: int, until: float) -> None:
        """The ticket for a node's next upload, in place of the one before; valid up to `until` (Unix time)."""
        ...

    def fetch(self, node: str, sha256: str, size: int) -> FileBody:
        """A finished upload as a local file. Raises BlobError if it is not there or has another size."""
        ...

    def discard(self, node: str) -> None:
        """Remove everything a node has uploaded, and its ticket: its round is committed or given up."""
        ...

    # The gateway's side.

    def locate(self, sha256: str) -> Location | None:
        """Where to read a published blob; None for anything else, another node's upload above all."""
        ...

    def begin_upload(self, node: str, sha256: str, size: int) -> Location:
        """Begin an upload, or go on with it. Raises BlobRefusedError if the node's ticket does not cover it."""
        ...

    def finish_upload(self, node: str, sha256: str) -> None:
        """Verify an upload and make it what `fetch` finds. Raises BlobRefusedError if it is not what it claims."""
        ...


class Ticket(BaseModel):
    """What a node may upload next. `until` is Unix time."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_bytes: int = Field(ge=0)
    until: float


class FolderStore:
    """The store on a local or shared folder; the gateway serves its bytes.

    `down/SHA256` are the published blobs, `up/NODE/SHA256` the finished uploads, `tickets/NODE.json` the tickets. A
    node has at most one finished and one unfinished upload, each within its ticket: a newer one takes the place of the
    one before. What was fetched moves to `taken/NODE/SHA256`, where nothing that the node still sends can touch it. So
    the disk is bounded, whatever nodes send, and no node can take away a file that is being read.

    Nothing is synced. Uploads are found by their names, so who opens the folder first after a start of the machine has
    them hashed; the round loop opens it before the gateway is started.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in (root, self._down, self._up, self._taken, self._tickets):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        verify_after_boot(root, "up/*/*", "taken/*/*")
        self._lock = Lock()
        self._written: set[str] = set()
        self._incoming: dict[str, PartialFile] = {}

    @property
    def _down(self) -> Path:
        return self.root / "down"

    @property
    def _up(self) -> Path:
        return self.root / "up"

    @property
    def _taken(self) -> Path:
        return self.root / "taken"

    @property
    def _tickets(self) -> Path:
        return self.root / "tickets"

    def publish(self, sha256: str, body: Body) -> None:
        """See `BlobStore`. A whole file on the same file system is linked, not copied. Raises BlobError.

        Nothing is synced: a round loop that starts after a power cut is a new process, and that writes it again.
        """
        target = self._down / _checked_sha256(sha256)
        pending = target.with_name(f".pending-{target.name}")  # one name: a crash leaves one leftover at most
        with self._lock:
            if sha256 in self._written and target.is_file():
                return
            try:
                pending.unlink(missing_ok=True)
                if not _linked(body, pending):
                    with pending.open("xb", buffering=0) as file:
                        for piece in pieces(body):
                            _write_all(file.fileno(), piece)
                if pending.stat().st_size != len(body):
                    raise BlobError(f"{len(body)} bytes were to be published, {pending.stat().st_size} were written")
                pending.replace(target)
                self._written.add(sha256)
            except OSError as error:
                raise BlobError(f"{target} cannot be written: {error.strerror}") from error
            finally:
                pending.unlink(missing_ok=True)

    def retract(self, sha256: str) -> None:
        """See `BlobStore`. Downloads that read it go on to the end of their part."""
        with self._lock:
            self._written.discard(sha256)
            (self._down / _checked_sha256(sha256)).unlink(missing_ok=True)

    def published(self) -> set[str]:
        """See `BlobStore`."""
        return {path.name for path in self._down.iterdir() if _SHA256.fullmatch(path.name)}

    def published_file(self, sha256: str) -> FileBody | None:
        """A published blob as a file, for who serves it; None if it is not published."""
        try:
            return whole_file(self._down / sha256) if _SHA256.fullmatch(sha256) else None
        except FileNotFoundError:
            return None

    def allow(self, node: str, max_bytes: int, until: float) -> None:
        """See `BlobStore`."""
        ticket = Ticket(max_bytes=max_bytes, until=until)
        replace_file(self._tickets / f"{_checked_name(node)}.json", json.dumps(ticket.model_dump()))

    def ticket(self, node: str) -> Ticket:
        """The node's ticket, if it has one that is still valid. Raises BlobRefusedError."""
        path = self._tickets / f"{_checked_name(node)}.json"
        try:
            ticket = Ticket.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise BlobRefusedError("no task asks for an upload of this node") from None
        except ValidationError:
            raise BlobRefusedError(f"the ticket of {node} is damaged: its next task brings a new one") from None
        if time.time() > ticket.until:
            raise BlobRefusedError("the time for this upload is over")
        return ticket

    def fetch(self, node: str, sha256: str, size: int) -> FileBody:
        """See `BlobStore`. The same upload can be fetched again; one that was fetched before it is removed."""
        upload, taken = self._upload(node, sha256), self._taken / node / sha256
        try:
            if not taken.is_file():
                shutil.rmtree(taken.parent, ignore_errors=True)
                taken.parent.mkdir(mode=0o700)
                upload.replace(taken)
            body = whole_file(taken)
        except FileNotFoundError:
            raise BlobError(f"{node} has not uploaded the blob {sha256} that it speaks of") from None
        except OSError as error:
            raise BlobError(f"{taken} cannot be read: {error.strerror}") from error
        if body.size != size:
            raise BlobError(f"the blob {sha256} of {node} has {body.size} bytes, {size} were announced")
        return body

    def discard(self, node: str) -> None:
        """See `BlobStore`. What is still arriving at the gateway is refused from its next piece or part on."""
        (self._tickets / f"{_checked_name(node)}.json").unlink(missing_ok=True)
        shutil.rmtree(self._up / node, ignore_errors=True)
        shutil.rmtree(self._taken / node, ignore_errors=True)

    def locate(self, sha256: str) -> Location | None:
        """See `BlobStore`."""
        body = self.published_file(sha256)
        if body is None:
            return None
        return Location(
            bytes=body.size,
            parts=[Part(url=f"/v1/blobs/{sha256}/data", begin=low, end=high) for low, high in part_bounds(body.size)],
        )

    def begin_upload(self, node: str, sha256: str, size: int) -> Location:
        """See `BlobStore`. Raises BlobTooLargeError, BlobRefusedError, OSError."""
        ticket = self.ticket(node)
        if not 0 <= size <= ticket.max_bytes:
            raise BlobTooLargeError(f"an upload of {size} bytes is larger than the {ticket.max_bytes} that are allowed")
        target = self._upload(node, sha256)
        with self._lock:
            bounds = part_bounds(size)
            if self._is_here(node, sha256, size):
                done = [high - low for low, high in bounds]
            else:
                done = self._receiver(node, target, size).done()
        urls = [f"/v1/uploads/{sha256}/{index}" for index in range(len(bounds))]
        parts = [
            Part(url=url, begin=low, end=high, done=count)
            for url, (low, high), count in zip(urls, bounds, done, strict=True)
        ]
        return Location(bytes=size, parts=parts)

    def incoming(self, node: str, sha256: str) -> PartialFile:
        """The upload that a piece belongs to. Raises BlobIncompleteError if none was begun, BlobRefusedError."""
        self.ticket(node)
        with self._lock:
            partial = self._incoming.get(node)
            if partial is None or partial.sha256 != sha256 or not partial.alive:
                raise BlobIncompleteError(f"the upload {sha256} was not begun, or has ended")
            return partial

    def finish_upload(self, node: str, sha256: str) -> None:
        """See `BlobStore`. Takes as long as the disk takes. Raises BlobIncompleteError, BlobDamagedError, OSError."""
        target = self._upload(node, sha256)
        if self._is_here(node, sha256, None):
            self.ticket(node)
            return
        partial = self.incoming(node, sha256)
        try:
            partial.finish()
        except IncompleteError as error:
            raise BlobIncompleteError(str(error)) from None
        except HashMismatchError as error:
            raise BlobDamagedError(str(error)) from None
        for path in target.parent.iterdir():
            if _SHA256.fullmatch(path.name) and path != target:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Save how far unfinished uploads are; the next process goes on with them."""
        with self._lock:
            for partial in self._incoming.values():
                partial.close()
            self._incoming.clear()

    def _upload(self, node: str, sha256: str) -> Path:
        return self._up / _checked_name(node) / _checked_sha256(sha256)

    def _is_here(self, node: str, sha256: str, size: int | None) -> bool:
        """Whether the upload was finished, fetched or not; with another size it is not the one that is meant."""
        found = [path for path in (self._upload(node, sha256), self._taken / node / sha256) if path.is_file()]
        return any(size is None or path.stat().st_size == size for path in found)

    def _receiver(self, node: str, target: Path, size: int) -> PartialFile:
        """The one unfinished upload of a node; one of other bytes is removed for it."""
        partial = self._incoming.pop(node, None)
        if partial is not None:
            if partial.alive and (partial.target, partial.size) == (target, size):
                self._incoming[node] = partial
                return partial
            partial.close()
        target.parent.mkdir(mode=0o700, exist_ok=True)
        kept = {target.name, *(path.name for path in partial_names(target))}
        for path in target.parent.iterdir():
            if path.name not in kept and not _SHA256.fullmatch(path.name):
                path.unlink(missing_ok=True)
        self._incoming[node] = PartialFile(target, target.name, size)
        return self._incoming[node]


def _checked_sha256(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise BlobRefusedError(f"{sha256[:80]!r} is no sha256 in lower-case hexadecimal")
    return sha256


def _checked_name(node: str) -> str:
    if not _NAME.fullmatch(node):
        raise BlobRefusedError(f"{node[:80]!r} is no name of a node")
    return node


def _linked(body: Body, target: Path) -> bool:
    """Give the file of `body` a second name, if it is a whole file and on the same file system."""
    if not isinstance(body, FileBody) or body.offset or body.path.stat().st_size != body.size:
        return False
    try:
        os.link(body.path, target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _write_all(handle: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(handle, data[done:])
