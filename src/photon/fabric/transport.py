"""Connections in the event loop with TLS in memory: what the gateway's door receives, and puts under aiohttp."""

from __future__ import annotations

import asyncio
import socket
import ssl
from asyncio import FIRST_COMPLETED
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from photon.fabric.traffic import Wire
from photon.link.tls import TlsSession

_TAKE_BYTES = 2**16
_MOST_WAITING_BYTES, _LEAST_WAITING_BYTES = 2**18, 2**16


@dataclass(frozen=True)
class Patience:
    """How long the gateway waits for the other end of a connection."""

    handshake_s: float
    silence_s: float  # for a whole header, or for the next bytes in either direction
    linger_s: float  # until it has read the last of what it was sent


class Guest:
    """An accepted connection in the event loop; `wire` counts it once its owner is known."""

    session: TlsSession
    wire: Wire | None = None

    def __init__(self, sock: socket.socket, address: str, patience: Patience) -> None:
        self.sock, self.address, self.patience = sock, address, patience
        self.taken_bytes = self.given_bytes = 0
        self._loop = asyncio.get_running_loop()

    async def handshake(self, session: TlsSession) -> None:
        """Open the session. Raises ssl.SSLError, after the other end was told why; OSError."""
        self.session = session
        try:
            async with asyncio.timeout(self.patience.handshake_s):
                while not session.shake():
                    await self.send(session.outgoing())
                    await self._take()
                await self.send(session.outgoing())
        except ssl.SSLError:
            await self.farewell()
            raise

    async def first_line(self, most_bytes: int) -> bytes:
        """What is asked for first, up to the end of its line if that is no longer than `most_bytes`. Raises OSError."""
        async with asyncio.timeout(self.patience.silence_s):
            first = self.session.read_any()
            while b"\n" not in first and len(first) < most_bytes:
                first += await self.receive()
                if self.session.ended:
                    raise ConnectionResetError("ended before its first line")
        return first

    async def receive(self) -> bytes:
        """What came next, in the clear; it may be nothing, and is when the session has ended. Raises OSError."""
        await self._take()
        return self.session.read_any()

    async def send(self, data: bytes) -> None:
        """Send what the session had to send. Raises OSError."""
        if data:
            await self._loop.sock_sendall(self.sock, data)
            self.given_bytes += len(data)
            self._note()

    async def farewell(self) -> None:
        """Send the last, and wait until the other end has read it: closing at once could take it away."""
        with suppress(OSError):
            async with asyncio.timeout(self.patience.linger_s):
                self.session.farewell()
                await self.send(self.session.outgoing())
                self.sock.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(self.sock, _TAKE_BYTES):
                    pass

    async def _take(self) -> None:
        data = await self._loop.sock_recv(self.sock, _TAKE_BYTES)
        self.taken_bytes += len(data)
        self._note()
        self.session.feed(data)

    def _note(self) -> None:
        if self.wire is not None:
            self.wire.moved(self.taken_bytes, self.given_bytes)


class TlsTransport(asyncio.Transport):
    """Carries a protocol over a guest's connection, in `run`.

    It ends when the other end has, when the protocol closes it and all is sent, or when a step of sending takes too
    long.
    """

    def __init__(self, guest: Guest, context: ssl.SSLContext, protocol: asyncio.Protocol) -> None:
        super().__init__(
            {
                "peername": guest.sock.getpeername(),
                "sockname": guest.sock.getsockname(),
                "socket": guest.sock,
                "sslcontext": context,
                "peercert": guest.session.peer_certificate(),
            }
        )
        self._guest, self._protocol = guest, protocol
        self._waiting = bytearray()  # encrypted, to be sent
        self._wake, self._may_read = asyncio.Event(), asyncio.Event()
        self._closing = self._aborted = self._is_protocol_paused = False
        self._may_read.set()

    async def run(self, first: bytes) -> None:
        """Carry everything, beginning with what has been received already. Raises nothing."""
        writing = asyncio.create_task(self._write())
        reading = asyncio.create_task(self._read(first))
        error: BaseException | None = None
        try:
            await asyncio.wait({reading, writing}, return_when=FIRST_COMPLETED)
            if not writing.done():  # the other end sends no more; it may still be answered
                self.close()
                await asyncio.wait({writing})
        finally:
            for task in (reading, writing):
                task.cancel()
            results = await asyncio.gather(reading, writing, return_exceptions=True)
            error = next((result for result in results if isinstance(result, Exception)), None)
            self._closing = True
            self._protocol.connection_lost(error if isinstance(error, OSError) else None)

    # What protocols call.

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Whom it carries."""
        return self._protocol

    def is_closing(self) -> bool:
        """Whether it takes nothing more to send."""
        return self._closing

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send it when it can be; a protocol that is paused should wait."""
        if self._closing or not data:
            return
        self._guest.session.write(bytes(data))
        self._collect()
        if len(self._waiting) > _MOST_WAITING_BYTES and not self._is_protocol_paused:
            self._is_protocol_paused = True
            self._protocol.pause_writing()

    def close(self) -> None:
        """Send what is waiting, then end."""
        if not self._closing:
            self._closing = True
            self._guest.session.farewell()
            self._collect()
            self._wake.set()

    def abort(self) -> None:
        """End now."""
        self._closing = self._aborted = True
        self._waiting.clear()
        self._wake.set()

    def pause_reading(self) -> None:
        """Deliver nothing more for now."""
        self._may_read.clear()

    def resume_reading(self) -> None:
        """Deliver again."""
        self._may_read.set()

    def is_reading(self) -> bool:
        """Whether something may be delivered."""
        return self._may_read.is_set() and not self._closing

    def get_write_buffer_size(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._waiting)

    def can_write_eof(self) -> bool:
        """TLS ends in both directions at once."""
        return False

    # The two tasks.

    async def _read(self, first: bytes) -> None:
        self._protocol.connection_made(self)
        data = first
        while True:
            if data:
                self._protocol.data_received(data)
            if self._guest.session.ended:
                self._protocol.eof_received()
                return
            await self._may_read.wait()  # bounded by what the protocol does: it pauses only while it is busy
            data = await self._guest.receive()
            self._collect()  # TLS may have something to say to it

    async def _write(self) -> None:
        while not self._aborted:
            if not self._waiting:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            step = bytes(self._waiting[:_TAKE_BYTES])
            del self._waiting[:_TAKE_BYTES]
            async with asyncio.timeout(self._guest.patience.silence_s):
                await self._guest.send(step)
            if self._is_protocol_paused and len(self._waiting) <= _LEAST_WAITING_BYTES:
                self._is_protocol_paused = False
                self._protocol.resume_writing()

    def _collect(self) -> None:
        if data := self._guest.session.outgoing():
            self._waiting += data
            self._wake.set()
