"""Model-sized bytes between a node and the store, resumed where a connection broke.

A blob moves in parts, several at a time, each over a connection of its own: one connection over a long way seldom
fills the line. Where a part stands is known at the receiving end (`link/partial.py`), so what breaks, whichever end or
wire it was, goes on from there.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import NoReturn

from pydantic import ValidationError

from photon.link.body import FileBody
from photon.link.client import (
    GatewayClient,
    LinkDownError,
    LinkError,
    LinkRefusedError,
    check_status,
    explained,
    outside_connection,
    read_answer,
)
from photon.link.partial import HashMismatchError, PartialBusyError, PartialFile
from photon.link.store import Location, Part

__all__ = ["GatewayClient", "LinkDownError", "LinkError", "LinkRefusedError", "download", "upload"]

OnBytes = Callable[[int], None]
PIECE_BYTES = 2**19
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_PARTIAL_CONTENT, _CONFLICT, _UNPROCESSABLE = 206, 409, 422


def download(
    client: GatewayClient,
    sha256: str,
    target: Path,
    *,
    streams: int,
    deadline_s: float,
    on_bytes: OnBytes | None = None,
) -> int:
    """Fetch a published blob into the file `target`; the bytes that came over the wire for it, 0 if it is there.

    `on_bytes` is told of each piece, on any thread, and of 0 bytes before each pass; what it raises ends it. What came
    stays beside `target`, and the next call goes on with it. Raises LinkRefusedError; LinkDownError if it is not whole
    after `deadline_s`, however often the connection broke; OSError of the own disk.
    """
    transfer = _Download(client, sha256, target, streams, deadline_s, on_bytes)
    try:
        transfer.run()
    finally:
        transfer.close()
    return transfer.moved_bytes


def upload(
    client: GatewayClient,
    sha256: str,
    body: FileBody,
    *,
    streams: int,
    deadline_s: float,
    on_bytes: OnBytes | None = None,
) -> int:
    """Send `body`, whose sha256 it is, to the store; the bytes that were sent. Errors are those of `download`."""
    transfer = _Upload(client, sha256, body, streams, deadline_s, on_bytes)
    transfer.run()
    return transfer.moved_bytes


class _MismatchError(Exception):
    """All bytes moved, and the receiver found other ones."""


class _Lines:
    """The connections of one thread: one to the gateway, one to the last other place."""

    def __init__(self, client: GatewayClient) -> None:
        self.client = client
        self._open: dict[str, HTTPConnection] = {}

    def to(self, url: str) -> tuple[HTTPConnection, str, str]:
        """(connection, request target, the other end's name) for a part's URL. Raises LinkRefusedError."""
        if url.startswith("/"):
            if self.client.place not in self._open:
                self._open[self.client.place] = self.client.connect()
            return self._open[self.client.place], url, self.client.place
        connection, target = outside_connection(url, self.client.timeout_s)
        place = f"{connection.host}:{connection.port}"
        return self._open.setdefault(place, connection), target, place

    def close(self) -> None:
        """Close them all; the next use opens new ones."""
        for connection in self._open.values():
            connection.close()
        self._open.clear()


class _Transfer(ABC):
    """What both directions share: passes over all parts until all are done, threads, pauses and the deadline."""

    def __init__(
        self, client: GatewayClient, sha256: str, streams: int, deadline_s: float, on_bytes: OnBytes | None
    ) -> None:
        self.client, self.sha256, self.streams, self.deadline_s = client, sha256, streams, deadline_s
        self.moved_bytes = 0
        self._on_bytes = on_bytes
        self._deadline = time.monotonic() + deadline_s
        self._lock = Lock()
        self._stop = Event()
        self._errors: list[BaseException] = []

    def arrived(self) -> bool:
        """Whether there is nothing to do, be it that another process of this machine did it meanwhile."""
        return False

    @abstractmethod
    def locate(self) -> Location:
        """Where the parts are now. Raises LinkError."""

    @abstractmethod
    def done(self, location: Location) -> list[int]:
        """Bytes of each part that the receiver has."""

    @abstractmethod
    def move(self, lines: _Lines, location: Location, index: int) -> None:
        """Move what is missing of one part. Raises LinkError."""

    @abstractmethod
    def finish(self) -> None:
        """Have the whole verified. Raises _MismatchError, LinkError."""

    def run(self) -> None:
        """Pass over the parts until the whole is verified, or the deadline is over, or it is refused."""
        pause_s, reached, mismatches = _FIRST_PAUSE_S, -1, 0
        while not self.arrived():
            if self._on_bytes is not None:
                self._on_bytes(0)  # while nothing moves, nobody else would ask whether it is still wanted
            try:
                location = self.locate()
                have = sum(self.done(location))
                if have > reached:  # the link does carry something: no reason to wait longer and longer
                    reached, pause_s = have, _FIRST_PAUSE_S
                self._pass(location)
                self.finish()
            except LinkDownError as error:
                wait_s = pause_s * (0.5 + secrets.randbelow(1000) / 2000)  # many nodes must not come back at once
                if time.monotonic() + wait_s >= self._deadline:
                    self._give_up(error)
                time.sleep(wait_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            except _MismatchError as error:
                mismatches += 1
                if mismatches > 1:
                    raise LinkRefusedError(
                        f"blob {self.sha256} arrived twice with other bytes than its sha256 says: a disk or memory is "
                        f"bad, or the sender's file has changed ({error})"
                    ) from None
                reached = -1
            else:
                return

    def count(self, moved_bytes: int) -> None:
        """Note bytes that moved. Raises LinkDownError once the transfer is over."""
        with self._lock:
            self.moved_bytes += moved_bytes
        if self._on_bytes is not None:
            self._on_bytes(moved_bytes)
        if self._stop.is_set() or time.monotonic() >= self._deadline:
            raise LinkDownError("the transfer was stopped")

    def _give_up(self, error: LinkDownError) -> NoReturn:
        raise LinkDownError(f"blob {self.sha256} was not whole after {self.deadline_s:g} s: {error}") from None

    def _pass(self, location: Location) -> None:
        """Have every part moved. Raises the first error that no thread got over."""
        todo: SimpleQueue[int] = SimpleQueue()
        for index, (part, done) in enumerate(zip(location.parts, self.done(location), strict=True)):
            if done < part.end - part.begin:
                todo.put(index)
        self._errors.clear()
        self._stop.clear()
        threads = [
            Thread(target=self._work, args=(todo, location), name=f"photon-transfer-{number}", daemon=True)
            for number in range(min(max(1, self.streams), todo.qsize()))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()  # bounded: each read and write has its timeout, and after each the deadline is asked
        finally:
            self._stop.set()
        refusals = [error for error in self._errors if not isinstance(error, LinkDownError)]
        for error in [*refusals, *self._errors]:
            raise error

    def _work(self, todo: SimpleQueue[int], location: Location) -> None:
        lines = _Lines(self.client)
        try:
            while not self._stop.is_set():
                location = self._move_stubbornly(lines, location, todo.get_nowait())
        except Empty:
            pass
        except LinkDownError as error:
            self._errors.append(error)  # the other threads go on: their connections may hold
        except BaseException as error:  # noqa: BLE001  # it is raised again in the caller's thread
            self._errors.append(error)
            self._stop.set()
        finally:
            lines.close()

    def _move_stubbornly(self, lines: _Lines, location: Location, index: int) -> Location:
        """Move a part over as many connections as it takes, while each brings it further; the newest location."""
        while True:
            before = self.done(location)[index]
            try:
                self.move(lines, location, index)
            except LinkDownError:
                lines.close()
                if self._stop.is_set() or time.monotonic() >= self._deadline:
                    raise
                location = self.locate()
                have, part = self.done(location)[index], location.parts[index]
                if have == part.end - part.begin:
                    return location  # it was whole there; what broke was the answer
                if have <= before:
                    raise
            else:
                return location


class _Download(_Transfer):
    def __init__(
        self,
        client: GatewayClient,
        sha256: str,
        target: Path,
        streams: int,
        deadline_s: float,
        on_bytes: OnBytes | None,
    ) -> None:
        super().__init__(client, sha256, streams, deadline_s, on_bytes)
        self.target = target
        self._partial: PartialFile | None = None

    def arrived(self) -> bool:
        return self.target.exists()

    def locate(self) -> Location:
        location = _location(self.client.json("GET", f"/v1/blobs/{self.sha256}"))
        bounds = tuple((part.begin, part.end) for part in location.parts)
        with self._lock:
            if self._partial is None or not self._partial.alive:
                try:
                    self._partial = PartialFile(self.target, self.sha256, location.bytes, bounds)
                except PartialBusyError as error:
                    raise LinkDownError(str(error)) from None
                if self.target.exists():  # whoever received it has just finished
                    self._partial.discard()
                    raise LinkDownError(f"{self.target} has appeared meanwhile")
            if self._partial.bounds != bounds:
                raise LinkRefusedError(f"{self.client.place} has changed blob {self.sha256} while it was downloaded")
        return location

    def done(self, location: Location) -> list[int]:
        return self._file.done()

    def move(self, lines: _Lines, location: Location, index: int) -> None:
        part = location.parts[index]
        position = part.begin + self._file.done()[index]
        connection, target, place = lines.to(part.url)
        wanted = f"bytes {position}-{part.end - 1}/"
        with explained(place):
            connection.request("GET", target, headers={"Range": wanted.replace(" ", "=")[:-1]})
            response = connection.getresponse()
        if response.status != _PARTIAL_CONTENT or not response.getheader("Content-Range", "").startswith(wanted):
            _refuse(response, part, place)
        buffer = memoryview(bytearray(PIECE_BYTES))
        while position < part.end:
            with explained(place):
                count = response.readinto(buffer[: min(PIECE_BYTES, part.end - position)])
            if count == 0:
                raise LinkDownError(f"{place} ended the connection within a part")
            self._file.write(index, position, buffer[:count])
            position += count
            self.count(count)

    def finish(self) -> None:
        try:
            self._file.finish()
        except HashMismatchError as error:
            raise _MismatchError(str(error)) from None

    def close(self) -> None:
        """Save how far it is."""
        if self._partial is not None:
            self._partial.close()

    @property
    def _file(self) -> PartialFile:
        assert self._partial is not None  # noqa: S101  # `locate` comes first
        return self._partial


class _Upload(_Transfer):
    def __init__(
        self,
        client: GatewayClient,
        sha256: str,
        body: FileBody,
        streams: int,
        deadline_s: float,
        on_bytes: OnBytes | None,
    ) -> None:
        super().__init__(client, sha256, streams, deadline_s, on_bytes)
        self.body = body

    def locate(self) -> Location:
        location = _location(self.client.json("POST", f"/v1/uploads/{self.sha256}", {"bytes": self.body.size}))
        if location.bytes != self.body.size:
            raise LinkRefusedError(f"{self.client.place} asks for {location.bytes} bytes of {self.body.size}")
        return location

    def done(self, location: Location) -> list[int]:
        return [part.done for part in location.parts]

    def move(self, lines: _Lines, location: Location, index: int) -> None:
        part = location.parts[index]
        at_gateway = part.url.startswith("/")
        begin = part.begin + (part.done if at_gateway else 0)
        connection, target, place = lines.to(part.url)
        with explained(place):
            connection.putrequest("PUT", target, skip_accept_encoding=True)
            connection.putheader("Content-Length", str(part.end - begin))
            if at_gateway:
                connection.putheader("Content-Range", f"bytes {begin}-{part.end - 1}/{self.body.size}")
            else:
                connection.putheader("x-ms-blob-type", "BlockBlob")  # Azure asks for it; the other clouds do not care
            connection.endheaders()
        for piece in FileBody(self.body.path, self.body.offset + begin, part.end - begin).chunks(PIECE_BYTES):
            try:
                with explained(place):
                    connection.send(piece)
            except LinkDownError:  # perhaps it said why before it hung up
                with explained(place):
                    response = connection.getresponse()
                _refuse(response, part, place)
            self.count(len(piece))
        with explained(place):
            response = connection.getresponse()
        if not 200 <= response.status < 300:  # HTTP's own numbers
            _refuse(response, part, place)
        read_answer(response, place)

    def finish(self) -> None:
        try:
            self.client.json("POST", f"/v1/uploads/{self.sha256}/finish")
        except LinkRefusedError as error:
            if error.status == _CONFLICT:
                raise LinkDownError(str(error)) from None
            if error.status == _UNPROCESSABLE:
                raise _MismatchError(str(error)) from None
            raise


def _location(answer: object) -> Location:
    try:
        return Location.model_validate(answer)
    except ValidationError as error:
        raise LinkRefusedError(
            f"the gateway described a blob in a way that makes no sense: {error.errors()[0]['msg']}"
        ) from None


def _refuse(response: HTTPResponse, part: Part, place: str) -> NoReturn:
    """Raise what an answer means that is not the wanted one."""
    asked = f"bytes {part.begin}-{part.end} of a blob"
    if part.url.startswith("/"):
        try:
            check_status(response.status, read_answer(response, place), asked, place)
        except LinkRefusedError as error:
            if error.status != _CONFLICT:
                raise
            raise LinkDownError(str(error)) from None  # it stands elsewhere than we thought: ask, and go on from there
    # Of another place no word is repeated: it may hold what signs the URL. A URL may be too old: the next is not.
    raise LinkDownError(f"{place} does not serve {asked}: status {response.status}")
