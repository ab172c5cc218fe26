"""Bytes of blobs at the gateway: each connection in a thread of its own, with a strict little HTTP.

One event loop carried all of them before, and was the slowest part of an exchange: opening TLS, hashing and writing
release the interpreter's lock, so threads use all cores, and a slow disk holds up its own connection alone. Only
connections of the authority's certificates come here, a few of each identity.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http import HTTPStatus
from threading import Lock, Thread

from photon.fabric.admission import Admission, RequestRefusedError, identity_of
from photon.fabric.traffic import TrafficAccounts, Wire
from photon.fabric.transport import Guest
from photon.identity import Identity
from photon.link.body import FileBody
from photon.link.partial import BeyondPartError, OffsetError, PartialFile
from photon.link.store import BlobStore, FolderStore
from photon.link.tls import TlsStream

BLOB_LINE = re.compile(rb"(?:GET /v1/blobs/[0-9a-f]{64}/data|PUT /v1/uploads/[0-9a-f]{64}/[0-9]{1,5}) HTTP/1\.1\r\n")
MAX_LINES = 128  # connections, and so threads; an identity that has none may have one nevertheless
_HEAD_BYTES = 8192
# A connection holds up to four times this: the piece, what was taken from the kernel, and OpenSSL's copy of that with a
# third to spare. MAX_LINES of them were measured to hold 120 MB beside the 120 MB of an idle gateway. With 2**19, as
# nodes have it, it was 340 MB in all, where 300 are granted.
_PIECE_BYTES = 2**18
_PATH = re.compile(r"/v1/(blobs|uploads)/([0-9a-f]{64})/(data|[0-9]{1,5})")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):[ \t]*([ -~]*?)[ \t]*")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
_LENGTH = re.compile(r"\d{1,18}")
_LOG = logging.getLogger("photon.gateway")


@dataclass(frozen=True)
class Head:
    """What a request says before its body. Names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def length(self) -> int | None:
        """Bytes of the body, None if it does not say. Raises RequestRefusedError."""
        text = self.headers.get("content-length")
        if text is None or "transfer-encoding" in self.headers:
            return None
        if not _LENGTH.fullmatch(text):
            raise RequestRefusedError(400, "the Content-Length is none")
        return int(text)


def parse_head(data: bytes) -> Head:
    """The head of a request, without the empty line at its end. Raises RequestRefusedError."""
    try:
        first, *lines = data.decode("ascii").split("\r\n")
        method, path, version = first.split(" ")
    except ValueError:
        raise RequestRefusedError(400, "this is not HTTP/1.1") from None
    if version != "HTTP/1.1":
        raise RequestRefusedError(400, "this is not HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None or match[1].lower() in headers:
            raise RequestRefusedError(400, "a header is malformed, or there twice")
        headers[match[1].lower()] = match[2]
    return Head(method, path, headers)


class Line:
    """One connection: its heads, bodies and answers. It ends at the first that is out of order."""

    def __init__(self, guest: Guest, wire: Wire) -> None:
        self.stream = TlsStream(guest.sock, guest.session, guest.taken_bytes, guest.given_bytes, _PIECE_BYTES)
        self.address, self.wire, self._patience = guest.address, wire, guest.patience
        self.is_in_order = True  # whether a next request can follow
        self.answered = False  # whether an answer to the request at hand has begun
        self.held = ExitStack()  # what ends with it
        self._buffer = memoryview(bytearray(_PIECE_BYTES))

    def head(self) -> Head | None:
        """The next request's head; None if the other end has none left. Raises RequestRefusedError, OSError."""
        self.answered = False
        data, end = b"", time.monotonic() + self._patience.silence_s
        while b"\r\n\r\n" not in data:
            if len(data) > _HEAD_BYTES:
                break
            left = end - time.monotonic()
            if left <= 0:
                return None
            self.stream.settimeout(left)
            try:
                count = self.stream.recv_into(self._buffer[: _HEAD_BYTES * 2])
            except TimeoutError:
                return None
            if not count:
                return None
            data += self._buffer[:count]
        head, _, rest = data.partition(b"\r\n\r\n")
        if len(head) > _HEAD_BYTES:
            raise RequestRefusedError(431, "the header is too long")
        self.stream.session.unread(rest)
        self.stream.settimeout(self._patience.silence_s)
        self.note()
        return parse_head(head)

    def body(self, left: int) -> memoryview:
        """The next piece of a body of which `left` bytes are missing; the next one overwrites it. Raises OSError."""
        count = self.stream.recv_into(self._buffer[: min(left, _PIECE_BYTES)])
        if not count:
            raise ConnectionResetError("ended within a body")
        self.note()
        return self._buffer[:count]

    def answer(self, status: int, content: Mapping[str, object]) -> None:
        """Answer in JSON. Raises OSError."""
        self.answered = True
        self.stream.sendall(json_answer(status, content, last=not self.is_in_order))
        self.note()

    def begin_answer(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        """Send the head of an answer. Raises OSError."""
        self.answered = True
        self.stream.sendall(_answer_head(status, length, headers, last=not self.is_in_order))

    def send_file(self, file: int, begin: int, end: int) -> bool:
        """Send bytes of a file; False if it ends before. Raises OSError."""
        while begin < end:
            count = os.preadv(file, [self._buffer[: min(_PIECE_BYTES, end - begin)]], begin)
            if not count:
                return False
            self.stream.sendall(self._buffer[:count])
            self.wire.sent_body(count, self.stream.given_bytes)
            begin += count
        return True

    def go_on(self) -> None:
        """Tell a careful client that its body is welcome. Raises OSError."""
        self.stream.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def note(self) -> None:
        """Keep the accounts of this connection up to date."""
        self.wire.moved(self.stream.taken_bytes, self.stream.given_bytes)

    def close(self, abort: bool) -> None:
        """End it; with `abort` what the kernel has not sent yet is thrown away."""
        if not abort:
            self.stream.linger(self._patience.linger_s)
        self.note()
        self.wire.close()  # before its socket
        if abort:
            self.stream.abort()
        else:
            self.stream.close()


class BlobServer:
    """Takes connections over from the gateway's door, once they are open and ask for bytes of a blob."""

    def __init__(self, store: BlobStore, admission: Admission, traffic: TrafficAccounts) -> None:
        self.admission = admission
        self._store, self._traffic = store, traffic
        self._lines: dict[Line, Thread] = {}
        self._lock = Lock()
        self._stopping = False

    def take(self, guest: Guest) -> None:
        """Serve an open connection from now on, in a thread. Does not wait.

        Raises RequestRefusedError if it is one too many: then it is the caller's to end.
        """
        name = identity_of(guest.session.peer_certificate()).name
        with ExitStack() as held, self._lock:
            held.enter_context(self.admission.one_of(name, "connections for blobs"))
            is_first = all(line.wire.node != name for line in self._lines)
            if self._stopping or (len(self._lines) >= MAX_LINES and not is_first):
                raise RequestRefusedError(503, "the Aggregator has too many connections open")
            line = Line(guest, self._traffic.wire(name, guest.sock))
            held.callback(line.wire.close)
            thread = Thread(target=self._serve, args=(line,), name="photon-blobs", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                raise RequestRefusedError(503, "the Aggregator can start no thread") from None
            self._lines[line] = thread
            line.held = held.pop_all()

    def stop(self, within_s: float) -> None:
        """End all connections, and wait for their threads."""
        with self._lock:
            self._stopping = True
            lines = dict(self._lines)
        for line in lines:
            with suppress(OSError):
                line.stream.sock.shutdown(socket.SHUT_RDWR)  # its thread meets an end, wherever it waits
        for thread in lines.values():
            thread.join(within_s)

    def _serve(self, line: Line) -> None:
        abort = True
        try:
            while line.is_in_order and not self._stopping and self._request(line):
                pass
            abort = False
        except OSError:
            pass  # the other end is gone, or silent: there is nobody to tell
        except Exception as error:  # noqa: BLE001  # it ends this connection only
            _LOG.error("a connection failed", exc_info=error)
        finally:
            line.close(abort)
            with self._lock:
                self._lines.pop(line, None)
                line.held.close()

    def _request(self, line: Line) -> bool:
        """Answer the next request; False if there is none. Raises OSError if the connection is of no more use."""
        head = None
        try:
            head = line.head()
            if head is None:
                return False
            self._answer(line, head)
        except Exception as error:
            if line.answered or (head is None and isinstance(error, OSError)):
                raise
            line.is_in_order = False  # some of its body may be on the way
            refused = self.admission.refusal(error, line.wire.node, line.address)
            line.answer(refused.status, refused.answer)
        return True

    def _answer(self, line: Line, head: Head) -> None:
        identity = identity_of(line.stream.session.peer_certificate())
        if head.headers.get("connection", "").lower() == "close":
            line.is_in_order = False
        titled = {key.title(): value for key, value in head.headers.items()}
        self.admission.admit(identity, head.path, titled)
        match = _PATH.fullmatch(head.path)
        asked = (head.method, match[1], match[3] == "data") if match is not None else None
        if match is not None and asked == ("GET", "blobs", True):
            self._get(line, head, match[2])
        elif match is not None and asked == ("PUT", "uploads", False):
            self._put(line, identity, head, match)
        else:
            raise RequestRefusedError(421, "on this connection only bytes of blobs can be asked for")

    def _get(self, line: Line, head: Head, sha256: str) -> None:
        if head.length or "transfer-encoding" in head.headers:
            raise RequestRefusedError(400, "a GET has no body")
        body = published(self._store, sha256)
        begin, end = requested_range(head.headers.get("range"), body.size)
        headers = {"Content-Type": "application/octet-stream"}
        if "range" in head.headers:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{body.size}"
        with body.path.open("rb", buffering=0) as file:
            line.begin_answer(206 if "range" in head.headers else 200, end - begin, headers)
            if not line.send_file(file.fileno(), begin, end):
                raise ConnectionAbortedError("the file ended before")

    def _put(self, line: Line, identity: Identity, head: Head, match: re.Match[str]) -> None:
        if not isinstance(self._store, FolderStore):
            raise RequestRefusedError(404, "uploads of this run do not pass the gateway")
        node, index = identity.name, int(match[3])
        partial = self._store.incoming(node, match[2])
        position = checked_piece(head, partial, index)
        if head.headers.get("expect", "").lower() == "100-continue":
            line.go_on()
        low, end = partial.bounds[index][0], position + (head.length or 0)
        while position < end:
            data = line.body(end - position)
            self._traffic.up(node, len(data))
            partial.write(index, position, data)
            position += len(data)
        line.answer(200, {"done": position - low})


def json_answer(status: int, content: Mapping[str, object], last: bool) -> bytes:
    """A whole answer; `last`: the connection is closed after it."""
    data = json.dumps(content).encode()
    return _answer_head(status, len(data), {"Content-Type": "application/json; charset=utf-8"}, last) + data


def _answer_head(status: int, length: int, headers: Mapping[str, str], last: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += ["Connection: close"] if last else []
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def published(store: BlobStore, sha256: str) -> FileBody:
    """The file of a published blob. Raises RequestRefusedError."""
    body = store.published_file(sha256) if isinstance(store, FolderStore) else None
    if body is None:
        raise RequestRefusedError(404, "no such blob is published")
    return body


def requested_range(header: str | None, size: int) -> tuple[int, int]:
    """(begin, end) of the one range that is asked for, all without a header. Raises RequestRefusedError."""
    if header is None:
        return 0, size
    match = _RANGE.fullmatch(header)
    if match is None:
        raise RequestRefusedError(416, "expected one range, bytes=BEGIN-LAST")
    begin, last = int(match[1]), int(match[2] or size - 1)
    if not begin <= last or begin >= size:
        raise RequestRefusedError(416, f"the blob has {size} bytes")
    return begin, min(last + 1, size)


def checked_piece(head: Head, partial: PartialFile, index: int) -> int:
    """Where the piece begins that a PUT brings. Raises RequestRefusedError, OffsetError, BeyondPartError."""
    match = _CONTENT_RANGE.fullmatch(head.headers.get("content-range", ""))
    if match is None:
        raise RequestRefusedError(400, "expected Content-Range: bytes BEGIN-LAST/TOTAL")
    begin, last, total = (int(number) for number in match.groups())
    if head.length is None:
        raise RequestRefusedError(411, "expected a Content-Length")
    if last < begin or head.length != last + 1 - begin:
        raise RequestRefusedError(400, "Content-Range and Content-Length do not agree")
    if index >= len(partial.bounds) or total != partial.size:
        raise RequestRefusedError(404, f"the upload has {partial.size} bytes in {len(partial.bounds)} parts")
    low, high = partial.bounds[index]
    done = partial.done()[index]
    if begin < low or last >= high:
        raise BeyondPartError(f"part {index} is of bytes {low} to {high}")
    if begin != low + done:
        raise OffsetError(f"part {index} goes on at byte {low + done}", done)
    return begin
