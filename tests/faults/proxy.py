"""A bad network on one machine: a TCP proxy that can be slowed, delayed, stalled, cut and mended while it runs.

Each direction of a connection is a pipe of two threads with a queue between them: one reads, at the rate of the line,
and one writes, as late as the line is long. Only the standard library; every wait ends with its connection.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

Direction = Literal["up", "down"]  # up: from client to server
State = Literal["open", "stalled", "cut", "blackhole", "closed"]

_CHUNK_BYTES = 2**16
_QUEUE_BYTES = 2**26  # what can be under way in a pipe: with a delay of 1 s, 512 Mbit/s
_SOCKET_BUFFER_BYTES = 2**18  # else the kernel would take in megabytes that a slow line has not carried yet
_TICK_S = 0.1  # how often a thread that waits for a socket looks whether it should go on
_CONNECT_DEADLINE_S = 5.0
_END_DEADLINE_S = 10.0
_SLICES_PER_S = 20  # a throttled stream goes in pieces of 1/20 s


@dataclass
class _Line:
    """The rate of one direction, shared by all connections."""

    bytes_per_s: float | None = None
    free_at: float = 0.0  # when it has carried what was read so far
    version: int = 0  # of the rate: who waits at an old one asks again


@dataclass(eq=False)
class _Pipe:
    """One direction of one connection."""

    direction: Direction
    source: socket.socket
    target: socket.socket
    changed: threading.Condition  # on the proxy's lock
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)  # (when it is due, what); empty bytes are the end
    queued_bytes: int = 0
    seen: bytearray = field(default_factory=bytearray)


@dataclass(eq=False)
class _Connection:
    pipes: tuple[_Pipe, _Pipe]
    threads: int  # that have not ended; the last one closes the sockets
    dropped: bool = False


class Proxy:
    """Forwards connections to `127.0.0.1:port` to the upstream server; a context manager.

    Rate and latency hold for each direction; the rate is shared by all connections, as on one line. With
    `capture_bytes`, up to so many bytes of what passes are kept, for tests that look for something in them.
    """

    def __init__(self, upstream_host: str, upstream_port: int, capture_bytes: int = 0) -> None:
        self.accepted = 0  # connections ever
        self.bytes_up = 0  # handed to the server's sockets
        self.bytes_down = 0  # handed to the clients'
        self._upstream = (upstream_host, upstream_port)
        self._lock = threading.Lock()  # guards all that follows
        self._gone = threading.Condition(self._lock)
        self._state: State = "open"
        self._delay_s = 0.0
        self._lines: dict[Direction, _Line] = {"up": _Line(), "down": _Line()}
        self._drop_after_bytes = 0  # 0: not armed
        self._capture_left_bytes = capture_bytes
        self._captured: list[bytearray] = []
        self._connections: set[_Connection] = set()
        self._held: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
        self._listener.settimeout(_TICK_S)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """Connections that are open now, to both sides."""
        with self._lock:
            return len(self._connections)

    @property
    def captured(self) -> list[bytes]:
        """What passed, a stream for each direction of each connection. Empty without `capture_bytes`."""
        with self._lock:
            return [bytes(stream) for stream in self._captured]

    def throttle(self, bytes_per_s: float | None) -> None:
        """Let so many bytes a second through in each direction; None = as many as come."""
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError("a rate is positive; stall() stops the traffic")
        with self._lock:
            for line in self._lines.values():
                line.bytes_per_s, line.free_at, line.version = bytes_per_s, 0.0, line.version + 1
            self._tell_all()

    def delay(self, seconds: float) -> None:
        """Hand on so much later, one way, what is read from now on. The rate stays what it is."""
        with self._lock:
            self._delay_s = seconds

    def drop_after(self, n_bytes: int) -> None:
        """Once, when `n_bytes` more have gone up over all connections: reset the connection that carried the last."""
        if n_bytes < 1:
            raise ValueError("at least one byte must pass; cut() breaks a connection at once")
        with self._lock:
            self._drop_after_bytes = n_bytes

    def stall(self) -> None:
        """Keep connections, old and new, but forward nothing, not even their end."""
        self._switch("stalled")

    def cut(self, *, blackhole: bool = False) -> None:
        """Reset all connections. New ones are reset too, or with `blackhole` accepted and never answered."""
        self._switch("blackhole" if blackhole else "cut")
        self._drop_all()
        self._release()

    def mend(self) -> None:
        """End a cut or a stall. What a stall held back goes on; who waits in the black hole is reset."""
        self._switch("open")
        self._release()

    def close(self) -> None:
        """Reset what is open and end all threads. Raises RuntimeError if one does not end."""
        self._switch("closed")
        self._drop_all()
        deadline = time.monotonic() + _END_DEADLINE_S
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._release()
        self._listener.close()
        if any(thread.is_alive() for thread in threads):
            raise RuntimeError("a thread of the proxy did not end")

    def _switch(self, state: State) -> None:
        with self._lock:
            if self._state != "closed":
                self._state = state
            self._tell_all()

    def _tell_all(self) -> None:
        for connection in self._connections:
            for pipe in connection.pipes:
                pipe.changed.notify_all()

    def _drop_all(self) -> None:
        with self._lock:
            for connection in self._connections:
                self._drop(connection)
            self._gone.wait_for(lambda: not any(one.dropped for one in self._connections), _END_DEADLINE_S)

    def _drop(self, connection: _Connection) -> None:
        """Tell its threads to end. Called with the lock."""
        connection.dropped = True
        for pipe in connection.pipes:
            with contextlib.suppress(OSError):
                pipe.source.shutdown(socket.SHUT_RD)  # wakes who reads; unlike the other ways it sends nothing
            pipe.changed.notify_all()

    def _release(self) -> None:
        with self._lock:
            held, self._held = self._held, []
        for client in held:
            _reset(client)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        with self._lock:
            self._threads = [*(one for one in self._threads if one.is_alive()), thread]

    # New connections

    def _accept(self) -> None:
        while self._state != "closed":
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with self._lock:
                self.accepted += 1
                state = self._state
                if state == "blackhole":
                    self._held.append(client)
            if state in ("cut", "closed"):
                _reset(client)
            elif state != "blackhole":
                self._start(self._open, client)

    def _open(self, client: socket.socket) -> None:
        server = socket.socket()
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
            server.settimeout(_CONNECT_DEADLINE_S)
            server.connect(self._upstream)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
                end.settimeout(_TICK_S)
        except OSError:
            _reset(server)
            _reset(client)
            return
        up = _Pipe("up", client, server, threading.Condition(self._lock))
        down = _Pipe("down", server, client, threading.Condition(self._lock))
        connection = _Connection((up, down), threads=4)
        with self._lock:
            late = self._state not in ("open", "stalled")  # cut while we connected
            if not late:
                self._connections.add(connection)
                if self._capture_left_bytes:
                    self._captured += [up.seen, down.seen]
        if late:
            _reset(server)
            _reset(client)
            return
        for pipe in connection.pipes:
            self._start(self._run, self._read, connection, pipe)
            self._start(self._run, self._write, connection, pipe)

    def _run(self, work: Callable[[_Connection, _Pipe], None], connection: _Connection, pipe: _Pipe) -> None:
        """A thread of a pipe. A break on one side is a break on both."""
        try:
            work(connection, pipe)
        except OSError:
            with self._lock:
                self._drop(connection)
        finally:
            with self._lock:
                connection.threads -= 1
                last = connection.threads == 0
            if last:
                for one in connection.pipes:
                    _reset(one.source) if connection.dropped else one.source.close()
                with self._lock:
                    self._connections.discard(connection)
                    self._gone.notify_all()

    # The first thread of a pipe

    def _read(self, connection: _Connection, pipe: _Pipe) -> None:
        data = b"?"
        while data:
            with self._lock:
                pipe.changed.wait_for(lambda: connection.dropped or self._state != "stalled")
                rate = self._lines[pipe.direction].bytes_per_s
            if connection.dropped:
                return
            try:
                data = pipe.source.recv(_CHUNK_BYTES if rate is None else _slice_bytes(rate))
            except TimeoutError:
                continue
            with self._lock:
                self._carry(connection, pipe, len(data))
                pipe.changed.wait_for(lambda: connection.dropped or pipe.queued_bytes < _QUEUE_BYTES)
                pipe.queue.append((time.monotonic() + self._delay_s, data))
                pipe.queued_bytes += len(data)
                pipe.changed.notify_all()

    def _carry(self, connection: _Connection, pipe: _Pipe, n_bytes: int) -> None:
        """Wait until the line has carried so many bytes more, after those of others. Called with the lock."""
        line = self._lines[pipe.direction]
        version, done_at = -1, 0.0
        while not connection.dropped and line.bytes_per_s is not None:
            now = time.monotonic()
            if version != line.version:
                version, done_at = line.version, max(now, line.free_at) + n_bytes / line.bytes_per_s
                line.free_at = done_at
            if now >= done_at:
                return
            pipe.changed.wait(done_at - now)

    # The second thread of a pipe

    def _write(self, connection: _Connection, pipe: _Pipe) -> None:
        while True:
            data = self._next(connection, pipe)
            if data is None:
                return
            if not data:
                pipe.target.shutdown(socket.SHUT_WR)
                return
            while data and not connection.dropped:
                data = data[self._send(connection, pipe, data) :]

    def _next(self, connection: _Connection, pipe: _Pipe) -> bytes | None:
        """What is due next, empty bytes at the end of the stream, None if the connection was dropped."""
        with self._lock:
            while not connection.dropped:
                left_s = pipe.queue[0][0] - time.monotonic() if pipe.queue else None
                if left_s is not None and left_s <= 0 and self._state != "stalled":
                    _, data = pipe.queue.popleft()
                    pipe.queued_bytes -= len(data)
                    pipe.changed.notify_all()
                    return data
                pipe.changed.wait(left_s if left_s is not None and left_s > 0 else None)
        return None

    def _send(self, connection: _Connection, pipe: _Pipe, data: bytes) -> int:
        """Hand on a first part of `data`: its length, 0 if the target takes nothing now."""
        with self._lock:
            pipe.changed.wait_for(lambda: connection.dropped or self._state != "stalled")
            limited = pipe.direction == "up" and self._drop_after_bytes > 0
            part = data[: self._drop_after_bytes] if limited else data
        if connection.dropped:
            return 0
        try:
            sent = pipe.target.send(part)
        except TimeoutError:
            return 0
        with self._lock:
            if pipe.direction == "up":
                self.bytes_up += sent
            else:
                self.bytes_down += sent
            kept = data[: min(sent, self._capture_left_bytes)]
            pipe.seen.extend(kept)
            self._capture_left_bytes -= len(kept)
            if limited and self._drop_after_bytes:
                self._drop_after_bytes = max(0, self._drop_after_bytes - sent)
                if self._drop_after_bytes == 0:
                    self._drop(connection)
        return sent


def _slice_bytes(bytes_per_s: float) -> int:
    return max(1, min(_CHUNK_BYTES, int(bytes_per_s / _SLICES_PER_S)))


def _reset(end: socket.socket) -> None:
    """Close it so that the other side meets a reset, not an orderly end."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
