"""Reads what a node and the gateway say to each other, as nobody could who has neither key: tests hold both.

A node connects to `port`, where it is shown the Aggregator's certificate; what it sends goes on to the gateway under
the node's own. All bytes in between are kept, as they were before TLS and after it.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from photon.identity import client_context
from photon.keys import AGGREGATOR_FILE

_PIECE_BYTES = 2**16
_DEADLINE_S = 20.0


class Reader:
    """Between the nodes that are given its `port` and the gateway on `gateway_port`; a context manager.

    It shows the gateway the certificate of `node`, so give each node one of its own.
    """

    def __init__(self, gateway_port: int, keys: Path, node: str) -> None:
        self.port = 0
        self._streams: dict[str, list[bytearray]] = {"up": [], "down": []}
        self._gateway_port, self._context = gateway_port, client_context(keys / f"{node}.key")
        self._server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server_context.load_cert_chain(keys / AGGREGATOR_FILE)
        self._loop, self._ending = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._server_context), self._loop
        )
        self.port = starting.result(_DEADLINE_S).sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(_DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_DEADLINE_S)
        self._loop.close()

    @property
    def sent(self) -> bytes:
        """All that the node has sent, one connection after another."""
        return b"\n".join(bytes(stream) for stream in self._streams["up"])

    @property
    def received(self) -> bytes:
        """All that it was answered."""
        return b"\n".join(bytes(stream) for stream in self._streams["down"])

    async def _connected(self, from_node: asyncio.StreamReader, to_node: asyncio.StreamWriter) -> None:
        up, down = bytearray(), bytearray()
        self._streams["up"].append(up)
        self._streams["down"].append(down)
        with suppress(OSError):
            from_gateway, to_gateway = await asyncio.open_connection(
                "127.0.0.1", self._gateway_port, ssl=self._context, server_hostname="127.0.0.1"
            )
            both = [
                asyncio.create_task(_pass_on(from_node, to_gateway, up)),
                asyncio.create_task(_pass_on(from_gateway, to_node, down)),
                asyncio.create_task(self._ending.wait()),
            ]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in both:
                task.cancel()
            to_gateway.close()
        to_node.close()

    async def _end(self) -> None:
        self._ending.set()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if others:
            await asyncio.wait(others, timeout=_DEADLINE_S)


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, seen: bytearray) -> None:
    with suppress(OSError, ssl.SSLError):
        while data := await source.read(_PIECE_BYTES):
            seen += data
            target.write(data)
            await target.drain()
