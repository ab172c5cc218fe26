"""TLS in memory, and over a blocking socket with it: half a MiB at a time.

Python's own `SSLSocket` asks the kernel twice for each record of 16 KiB. Here one call takes in what the kernel holds,
and the records are opened in memory: more bytes per second of CPU, and a session that can be handed from an event loop
to a thread.
"""

from __future__ import annotations

import io
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

TAKE_BYTES = 2**19  # what one call takes from the kernel at most; who has many streams takes less
GIVE_BYTES = 2**18  # what one call hands to it, and a timeout bounds: of 30 s, for a line of 9 kB/s and more
# OpenSSL's buffer for what is to be sent grows with what is written at once, and is cleared again: beyond this, moving
# and clearing its memory costs more than the calls that are saved.
_SEAL_BYTES = 2**16
_ANY_BYTES = 2**16


class TlsSession:
    """One end of a TLS connection that is told what came and says what is to be sent. For one thread at a time."""

    def __init__(self, context: ssl.SSLContext, server_hostname: str | None = None) -> None:
        """Without a name it is the server's end."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )
        self._early = b""  # clear bytes that are read first
        self.ended = False  # the other end will send no more

    def feed(self, data: bytes | memoryview) -> None:
        """Take in what came from the other end; nothing means that it has ended."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def shake(self) -> bool:
        """Take the handshake as far as it goes; whether it is over. Raises ssl.SSLError: `outgoing` then says why."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` with what was fed; 0 if that is nothing, or all there ever will be. Raises ssl.SSLError."""
        read, size, filled = self._tls.read, len(buffer), 0
        if self._early:
            filled = min(size, len(self._early))
            buffer[:filled], self._early = self._early[:filled], self._early[filled:]
        try:
            while filled < size:
                count = read(size - filled, buffer[filled:])
                if not count:
                    self.ended = True
                    break
                filled += int(count)
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):  # also without a farewell: lengths and hashes are checked
            self.ended = True
        return filled

    def read_any(self) -> bytes:
        """Everything that was fed, in the clear. Raises ssl.SSLError."""
        found, buffer = bytearray(), memoryview(bytearray(_ANY_BYTES))
        while count := self.read_into(buffer):
            found += buffer[:count]
        return bytes(found)

    def unread(self, data: bytes) -> None:
        """Put clear bytes back: they are read again, before any other."""
        self._early = data + self._early

    def write(self, data: bytes | memoryview) -> None:
        """Have it sent: it is in `outgoing` then. Raises ssl.SSLError."""
        if data:
            self._tls.write(data)

    def farewell(self) -> None:
        """Say that nothing more will be written."""
        with suppress(ssl.SSLError):  # it complains that the other end has not said so: it need not
            self._tls.unwrap()

    def outgoing(self) -> bytes:
        """Take what is to be sent."""
        return self._outgoing.read()

    def peer_certificate(self) -> dict[str, object] | None:
        """As `SSLSocket.getpeercert`."""
        certificate = self._tls.getpeercert()
        return None if certificate is None else dict(certificate)


class TlsStream:
    """A TLS session over `sock`, whose timeout bounds each wait. Not for two threads at once.

    `taken_bytes` and `given_bytes` count what came from the kernel and was handed to it, framing included. One call
    takes `take_bytes` at most, and the stream holds up to three times as much. It stands where `http.client` expects a
    socket.
    """

    def __init__(
        self,
        sock: socket.socket,
        session: TlsSession,
        taken_bytes: int = 0,
        given_bytes: int = 0,
        take_bytes: int = TAKE_BYTES,
    ) -> None:
        self.sock, self.session = sock, session
        self.taken_bytes, self.given_bytes = taken_bytes, given_bytes
        self._taken = memoryview(bytearray(take_bytes))
        self._readers, self._is_closed = 0, False

    def handshake(self) -> None:
        """Do the whole handshake. Raises ssl.SSLError, after the other end was told why; OSError."""
        try:
            while not self.session.shake():
                self._flush()
                self._take()
        except ssl.SSLError:
            with suppress(OSError):
                self._flush()
            raise
        self._flush()

    def recv_into(self, buffer: memoryview) -> int:
        """Fill `buffer` with what is here, after waiting for the first byte; 0 at the end. Raises OSError."""
        with self._one_wait() as hurry:
            while not (count := self.session.read_into(buffer)) and not self.session.ended:
                hurry()
                self._take()
        return count

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; the timeout bounds each 256 KiB of it. Raises OSError."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), GIVE_BYTES):
            self._send(self._sealed(view[begin : begin + GIVE_BYTES]))

    def settimeout(self, seconds: float | None) -> None:
        """See `socket.settimeout`."""
        self.sock.settimeout(seconds)

    def fileno(self) -> int:
        """See `socket.fileno`."""
        return self.sock.fileno()

    def makefile(self, mode: str) -> io.BufferedReader:
        """A reader; the socket stays open until it is closed too: what `http.client` expects."""
        if mode != "rb":
            raise ValueError(mode)
        self._readers += 1
        return _Reader(_Raw(self))

    def linger(self, seconds: float) -> None:
        """Send no more, and wait until the other end has read what was sent: closing at once could take it away."""
        end = time.monotonic() + seconds
        with suppress(OSError):
            self.session.farewell()
            self._flush()
            self.sock.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                self.sock.settimeout(left)
                if not self.sock.recv_into(self._taken):
                    return

    def abort(self) -> None:
        """Close at once, and have the kernel throw away what it has not sent."""
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """Close, once the readers are closed too."""
        self._is_closed = True
        if self._readers:
            return
        with suppress(OSError):
            self.sock.setblocking(False)  # a farewell is a courtesy that must not take time
            self.session.farewell()
            self._flush()
        self.sock.close()

    def reader_closed(self) -> None:
        """For a reader that closes."""
        self._readers -= 1
        if self._is_closed:
            self.close()

    def _take(self) -> None:
        """Feed the session with what the kernel has, after waiting for the first byte."""
        count = self.sock.recv_into(self._taken)
        self.taken_bytes += count
        self.session.feed(self._taken[:count])

    def _sealed(self, clear: memoryview) -> list[bytes]:
        """What is to be sent for `clear`, in pieces. Raises ssl.SSLError."""
        pieces = []
        for begin in range(0, len(clear), _SEAL_BYTES):
            self.session.write(clear[begin : begin + _SEAL_BYTES])
            pieces.append(self.session.outgoing())
        return pieces

    def _flush(self) -> None:
        self._send([self.session.outgoing()])

    def _send(self, pieces: list[bytes]) -> None:
        """Hand them to the kernel, as many with one call as it takes; the timeout bounds all of them together."""
        left = deque(memoryview(piece) for piece in pieces if piece)
        with self._one_wait() as hurry:
            while left:
                hurry()
                count = self.sock.sendmsg(left)
                self.given_bytes += count
                while left and count >= len(left[0]):
                    count -= len(left.popleft())
                if count:
                    left[0] = left[0][count:]

    @contextmanager
    def _one_wait(self) -> Iterator[Callable[[], None]]:
        """Have the timeout bound all that the block waits for: a byte now and then does not make it longer."""
        seconds, end = self.sock.gettimeout(), 0.0

        def hurry() -> None:
            nonlocal end
            if not seconds:
                return
            if not end:
                end = time.monotonic() + seconds
                return
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self.sock.settimeout(left)

        try:
            yield hurry
        finally:
            if end:
                with suppress(OSError):  # it may have been closed meanwhile
                    self.sock.settimeout(seconds)


class _Raw(io.RawIOBase):
    def __init__(self, stream: TlsStream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower: io hands out memoryviews
        return self._stream.recv_into(buffer)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.reader_closed()


class _Reader(io.BufferedReader):
    """Gives what is here instead of waiting until a buffer is full: when the line breaks, less is lost."""

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower, as its only caller is
        return self.readinto1(buffer)
