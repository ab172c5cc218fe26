"""The gateway's door: accepts connections, does their handshake, and sees by the first request who is to serve them.

The event loop holds every connection until it is open and has asked for something, so strangers cost no thread. Then
those that ask for bytes of blobs go to threads (`photon.fabric.blobs`), all others to aiohttp, by way of a transport
of TLS in memory. Each has deadlines, and is on its node's account from its first byte to its last.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import cast

from photon.fabric.admission import SOMEBODY
from photon.fabric.blobs import BLOB_LINE, BlobServer, json_answer
from photon.fabric.traffic import TrafficAccounts
from photon.fabric.transport import Guest, Patience, TlsTransport
from photon.identity import AuthenticationError, peer_identity
from photon.link.tls import TlsSession

# A process may have few descriptors (often 1024), and blobs need some: nobody may take all of them by connecting.
MAX_KNOCKING = 128  # connections that are not open yet: whoever knocks longest is sent away for a new one
MAX_CONNECTIONS = 64  # of one identity, beside those that carry bytes of blobs
_BACKLOG = 256
_LINE_BYTES = 256  # longer than any first line that asks for bytes of a blob
_NO_DESCRIPTOR_PAUSE_S = 1.0
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_LOG = logging.getLogger("photon.gateway")


class Door:
    """Who comes in. All methods run in one event loop."""

    def __init__(
        self,
        context: ssl.SSLContext,
        others: Callable[[], asyncio.Protocol],
        blobs: BlobServer,
        traffic: TrafficAccounts,
        patience: Patience,
    ) -> None:
        self._context, self._others, self._blobs = context, others, blobs
        self._traffic, self._patience = traffic, patience
        self._guests: set[asyncio.Task[None]] = set()
        self._knocking: dict[asyncio.Task[None], None] = {}  # oldest first
        self._connections: Counter[str] = Counter()

    @asynccontextmanager
    async def open(self, host: str, port: int) -> AsyncIterator[tuple[str, int]]:
        """Accept connections while the block runs; yields host and port. Raises OSError."""
        loop = asyncio.get_running_loop()
        listeners: list[socket.socket] = []
        accepting: list[asyncio.Task[None]] = []
        try:
            places = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for number, info in enumerate(places, start=1):
                try:
                    listeners.append(socket.create_server(info[4][:2], family=info[0], backlog=_BACKLOG))
                except OSError as error:
                    # A name like localhost may stand for an address of IPv6 where the machine has none.
                    if error.errno not in _NO_SUCH_ADDRESS or (number == len(places) and not listeners):
                        raise
                    continue
                listeners[-1].setblocking(False)
            accepting = [asyncio.create_task(self._accept(listener)) for listener in listeners]
            yield listeners[0].getsockname()[:2]
        finally:
            for task in accepting:
                task.cancel()
            await asyncio.gather(*accepting, return_exceptions=True)
            for listener in listeners:
                listener.close()

    async def close(self) -> None:
        """Send everybody away. Waits for the threads."""
        for task in self._guests:
            task.cancel()
        await asyncio.gather(*self._guests, return_exceptions=True)
        await asyncio.to_thread(self._blobs.stop, 2 * self._patience.linger_s)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, address = await asyncio.get_running_loop().sock_accept(listener)
            except ConnectionError:
                continue
            except OSError as error:  # no descriptor is left: some will be
                _LOG.error("no connection can be accepted: %s", error.strerror)
                await asyncio.sleep(_NO_DESCRIPTOR_PAUSE_S)
                continue
            task = asyncio.create_task(self._receive(sock, str(address[0])))
            self._guests.add(task)
            task.add_done_callback(self._guests.discard)
            self._knocking[task] = None
            task.add_done_callback(lambda task: self._knocking.pop(task, None))
            if len(self._knocking) > MAX_KNOCKING:
                oldest = next(iter(self._knocking))
                del self._knocking[oldest]
                oldest.cancel()
            await asyncio.sleep(0)  # let it begin, or end: accepting waits for nobody while others knock

    async def _receive(self, sock: socket.socket, address: str) -> None:
        """Serve one connection, or hand it over."""
        guest, handed_over = Guest(sock, address, self._patience), False
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await guest.handshake(TlsSession(self._context))
            self._knocking.pop(cast(asyncio.Task[None], asyncio.current_task()), None)
            with self._one_of(_name_of(guest.session) or SOMEBODY):
                first = await guest.first_line(_LINE_BYTES)
                if BLOB_LINE.match(first):
                    handed_over = await self._hand_over(guest, first)
                else:
                    await self._serve(guest, first)
        except OSError:
            pass  # it broke, was silent, or is no guest of ours: there is nobody to tell
        except Exception as error:  # noqa: BLE001  # it ends this connection only
            _LOG.error("a connection failed", exc_info=error)
        finally:
            if not handed_over:
                if guest.wire is not None:
                    guest.wire.close()
                sock.close()

    @contextmanager
    def _one_of(self, name: str) -> Iterator[None]:
        """Count a connection of an identity while the block runs. Raises ConnectionAbortedError if it has too many."""
        if self._connections[name] >= MAX_CONNECTIONS:
            raise ConnectionAbortedError("too many connections")
        self._connections[name] += 1
        try:
            yield
        finally:
            self._connections[name] -= 1

    async def _hand_over(self, guest: Guest, first: bytes) -> bool:
        """Let a thread serve it; False if it was sent away."""
        guest.session.unread(first)
        try:
            self._blobs.take(guest)
        except Exception as error:  # noqa: BLE001  # it is told
            name = _name_of(guest.session) or SOMEBODY
            refused = self._blobs.admission.refusal(error, name, guest.address)
            guest.session.write(json_answer(refused.status, refused.answer, last=True))
            await guest.farewell()
            return False
        return True

    async def _serve(self, guest: Guest, first: bytes) -> None:
        """Let aiohttp serve it."""
        name = _name_of(guest.session)
        if name is not None:
            guest.wire = self._traffic.wire(name, guest.sock)
        await TlsTransport(guest, self._context, self._others()).run(first)


def _name_of(session: TlsSession) -> str | None:
    try:
        return peer_identity(session.peer_certificate()).name
    except AuthenticationError:
        return None
