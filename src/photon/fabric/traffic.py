"""Bytes that crossed the gateway, per node, in a small file that the round loop reads.

Beside the bodies of blobs stands what the kernel says was really sent on the node's connections: handshakes, framing
and calls included, and what had to be sent again apart.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from photon.link.partial import replace_file

SAVE_EVERY_S = 1.0
_LOG = logging.getLogger("photon.gateway")
# struct tcp_info of Linux: tcpi_bytes_acked and _received (since 4.1), tcpi_bytes_sent and _retrans (since 4.19).
_PAIR, _ACKED_AND_RECEIVED, _SENT_AND_AGAIN = struct.Struct("=QQ"), 120, 200
_TCP_INFO_BYTES = 256


class BlobTraffic(BaseModel):
    """One node since the run began. `blob_*`: bodies, what was sent twice included. `sent_*`: all bytes over TCP."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    # The names before `sent_*` was counted: a run that goes on may have accounts with these.
    blob_up: int = Field(0, ge=0, validation_alias=AliasChoices("blob_up", "bytes_up"))
    blob_down: int = Field(0, ge=0, validation_alias=AliasChoices("blob_down", "bytes_down"))
    sent_up: int = Field(0, ge=0, description="Arrived from the node.")
    sent_down: int = Field(0, ge=0, description="Left for the node, each byte once.")
    retransmitted: int = Field(0, ge=0, description="Left for the node again, as it seemed to be lost.")
    counted: Literal["kernel", "application"] = Field(
        "kernel", description="Who counted `sent_*`; an application does not know what got lost."
    )

    @property
    def bytes_up(self) -> int:
        """Bodies of blobs, node to Aggregator."""
        return self.blob_up

    @property
    def bytes_down(self) -> int:
        """Bodies of blobs, Aggregator to node."""
        return self.blob_down


_ACCOUNTS = TypeAdapter(dict[str, BlobTraffic])


@dataclass(frozen=True)
class TcpBytes:
    """What was counted on one connection since it opened."""

    received: int = 0
    sent: int = 0
    retransmitted: int = 0  # beyond `sent`
    body_sent: int = 0  # of the bodies of blobs


def tcp_bytes(sock: socket.socket) -> TcpBytes | None:
    """The kernel's count for a connection; None where it keeps none (not Linux), or the socket is closed."""
    if sys.platform != "linux":
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return None
    if len(info) < _ACKED_AND_RECEIVED + _PAIR.size:
        return None
    acknowledged, received = _PAIR.unpack_from(info, _ACKED_AND_RECEIVED)
    if len(info) < _SENT_AND_AGAIN + _PAIR.size:
        return TcpBytes(received, acknowledged)
    sent, again = _PAIR.unpack_from(info, _SENT_AND_AGAIN)
    return TcpBytes(received, sent - again, again)


class TrafficAccounts:
    """The accounts in `path`; a gateway that starts again goes on with them. A kill loses at most a second of them.

    Methods may be called from any thread.
    """

    def __init__(self, path: Path, nodes: Iterable[str]) -> None:
        self.path = path
        self._of = {node: BlobTraffic() for node in nodes}
        self._lock = Lock()
        self._changed = False
        self._wires: set[Wire] = set()
        try:
            self._of |= read_traffic(path)
        except ValidationError:
            _LOG.warning("%s is damaged: bytes are counted from zero", path)

    def up(self, node: str, moved_bytes: int) -> None:
        """Count bytes of an upload's body."""
        with self._lock:
            self._of[node].blob_up += moved_bytes
            self._changed = True

    def wire(self, node: str, sock: socket.socket) -> Wire:
        """Count a connection of a node from now until it is closed; of a stranger to the run nothing is counted."""
        wire = Wire(self, node, sock)
        with self._lock:
            if node in self._of:
                self._wires.add(wire)
        return wire

    def settle(self, wire: Wire) -> None:
        """Put the last of a connection on the account."""
        with self._lock:
            if wire in self._wires:
                self._wires.discard(wire)
                self._add(wire)

    def save(self) -> None:
        """Write the file if a byte has moved since the last time."""
        with self._lock:
            for wire in self._wires:
                self._add(wire)
            if not self._changed:
                return
            self._changed = False
            text = _ACCOUNTS.dump_json(self._of).decode()
        replace_file(self.path, text)

    async def keep_saving(self) -> None:
        """Save every second, until cancelled."""
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            try:
                self.save()
            except OSError as error:
                self._changed = True
                _LOG.warning("%s cannot be written: %s", self.path, error.strerror)

    def _add(self, wire: Wire) -> None:
        now, before = wire.reading(), wire.settled
        if now == before:
            return
        wire.settled, account = now, self._of[wire.node]
        account.sent_up += now.received - before.received
        account.sent_down += now.sent - before.sent
        account.retransmitted += now.retransmitted - before.retransmitted
        account.blob_down += now.body_sent - before.body_sent
        if not wire.by_kernel:
            account.counted = "application"
        self._changed = True


class Wire:
    """One connection of a node, and how much of it is on the account. Close it before its socket."""

    def __init__(self, accounts: TrafficAccounts, node: str, sock: socket.socket) -> None:
        self.node, self.settled = node, TcpBytes()
        self._accounts, self._sock = accounts, sock
        self._moved, self._body, self._body_end = (0, 0), 0, 0
        self.by_kernel = tcp_bytes(sock) is not None

    def moved(self, taken: int, given: int) -> None:
        """What was taken from the socket and given to it so far."""
        self._moved = taken, given

    def sent_body(self, count: int, given: int) -> None:
        """More bytes of a blob's body are among the `given` that the socket was given so far."""
        self._body, self._body_end = self._body + count, given

    def reading(self) -> TcpBytes:
        """The newest count; the one before if the connection is gone.

        Of a body that was given to the kernel, what has not left does not count: it may never. What has left may have
        arrived, whatever the node could still say of it.
        """
        if not self.by_kernel:
            return TcpBytes(*self._moved, 0, self._body)
        now = tcp_bytes(self._sock)
        if now is None:
            return self.settled
        left = self._body - max(0, self._body_end - now.sent)
        return replace(now, body_sent=max(self.settled.body_sent, left))

    def close(self) -> None:
        """Settle for the last time."""
        self._accounts.settle(self)


def read_traffic(path: Path) -> dict[str, BlobTraffic]:
    """The accounts of every node; none if nothing has moved yet. Raises ValidationError, OSError."""
    try:
        return _ACCOUNTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
