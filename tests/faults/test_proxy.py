"""The bad network does what a test asks of it, and otherwise changes no byte. Times are only bounded from below."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from tests.faults.proxy import Proxy

DEADLINE_S = 20.0
MIB = 2**20


class Server:
    """Takes connections, keeps what each sends, and with `echo` sends it back; ends when the client does."""

    def __init__(self, echo: bool) -> None:
        self.echo = echo
        self.received: list[bytearray] = []
        self.ended: list[str] = []  # how connections ended, in that order
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.received.append(bytearray())
            threading.Thread(target=self._serve, args=(connection, self.received[-1]), daemon=True).start()

    def _serve(self, connection: socket.socket, received: bytearray) -> None:
        connection.settimeout(DEADLINE_S)
        with connection:
            try:
                while data := connection.recv(2**16):
                    received.extend(data)
                    if self.echo:
                        connection.sendall(data)
                self.ended.append("end")
            except OSError as error:
                self.ended.append(type(error).__name__)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server(echo=True)) as one:
        yield one


@pytest.fixture
def sink() -> Iterator[Server]:
    with closing(Server(echo=False)) as one:
        yield one


def connect(proxy: Proxy, timeout_s: float = DEADLINE_S) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout_s)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def read(client: socket.socket, n_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < n_bytes and (data := client.recv(2**16)):
        parts.extend(data)
    return bytes(parts)


def exchange(proxy: Proxy, data: bytes) -> bytes:
    """Send, end, and read until the other side ends, all at once."""
    errors: list[OSError] = []
    with connect(proxy) as client:

        def send() -> None:
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            except OSError as error:  # a reset is told once, to whoever comes first: the reader may see a mere end
                errors.append(error)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        try:
            answer = read(client, len(data) + 1)
        finally:
            sender.join(DEADLINE_S)
        if errors:
            raise errors[0]
        return answer


def test_what_goes_in_comes_out_and_is_counted(server: Server) -> None:
    streams = [random.Random(seed).randbytes(MIB + seed) for seed in range(4)]
    answers: dict[int, bytes] = {}

    def talk(index: int) -> None:
        answers[index] = exchange(proxy, streams[index])

    with Proxy("127.0.0.1", server.port, capture_bytes=3 * MIB) as proxy:
        threads = [threading.Thread(target=talk, args=(index,), daemon=True) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert answers == dict(enumerate(streams))
        assert proxy.bytes_up == proxy.bytes_down == sum(map(len, streams))
        assert proxy.accepted == 4
        wait(lambda: proxy.connections == 0)
        captured = proxy.captured
    assert sum(map(len, captured)) == 3 * MIB
    assert all(any(stream.startswith(piece) for stream in streams) for piece in captured)
    assert server.ended == ["end"] * 4


def test_half_a_connection_may_end_before_the_other(server: Server) -> None:
    with Proxy("127.0.0.1", server.port) as proxy, connect(proxy) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read(client, 100) == b"question"


def test_a_rate_is_shared_by_all_connections(sink: Server) -> None:
    """100 kB in all at 200 kB/s take half a second; were the rate each connection's own, a quarter would do."""
    with Proxy("127.0.0.1", sink.port) as proxy:
        proxy.throttle(200_000)
        begin = time.monotonic()
        with connect(proxy) as one, connect(proxy) as two:
            one.sendall(bytes(50_000))
            two.sendall(bytes(50_000))
            wait(lambda: proxy.bytes_up == 100_000)
        assert time.monotonic() - begin >= 0.5 * 0.95


def test_a_new_rate_holds_for_who_already_waits(sink: Server) -> None:
    with Proxy("127.0.0.1", sink.port) as proxy, connect(proxy) as client:
        proxy.throttle(0.001)  # a byte in a quarter of an hour
        client.sendall(bytes(100_000))
        time.sleep(0.1)
        assert proxy.bytes_up == 0
        proxy.throttle(None)
        wait(lambda: proxy.bytes_up == 100_000)
        with pytest.raises(ValueError, match="positive"):
            proxy.throttle(0)


def test_latency_is_not_a_rate(server: Server) -> None:
    """All of 8 MiB is under way before the first byte arrives; who sleeps for each piece would take in one only."""
    data = random.Random(1).randbytes(8 * MIB)
    with Proxy("127.0.0.1", server.port) as proxy, connect(proxy) as client:
        proxy.delay(DEADLINE_S * 10)
        client.sendall(data)  # more than all the buffers of the kernel
        assert proxy.bytes_up == 0
    with Proxy("127.0.0.1", server.port) as proxy:
        proxy.delay(0.3)
        begin = time.monotonic()
        assert exchange(proxy, data) == data
        assert time.monotonic() - begin >= 0.6  # there and back


def test_a_stall_holds_everything_and_loses_nothing(server: Server) -> None:
    with Proxy("127.0.0.1", server.port) as proxy, connect(proxy) as client:
        client.sendall(b"before")
        assert read(client, 6) == b"before"
        proxy.stall()
        client.sendall(b"during")
        late = connect(proxy)  # a new connection is taken, and stalls too
        late.sendall(b"late")
        late.shutdown(socket.SHUT_WR)
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert (proxy.bytes_up, proxy.bytes_down) == (6, 6)
        proxy.mend()
        client.settimeout(DEADLINE_S)
        assert read(client, 6) == b"during"
        with late:
            assert read(late, 100) == b"late"


def test_a_cut_resets_what_is_open_and_what_comes(server: Server) -> None:
    with Proxy("127.0.0.1", server.port) as proxy, connect(proxy) as client:
        client.sendall(b"before")
        assert read(client, 6) == b"before"
        proxy.cut()
        assert proxy.connections == 0
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        wait(lambda: server.ended == ["ConnectionResetError"])
        with pytest.raises(ConnectionError):
            exchange(proxy, b"while cut")
        assert len(server.received) == 1
        proxy.mend()
        assert exchange(proxy, b"after") == b"after"


def test_in_a_black_hole_nobody_answers(server: Server) -> None:
    with Proxy("127.0.0.1", server.port) as proxy:
        proxy.cut(blackhole=True)
        with connect(proxy, timeout_s=0.3) as client:
            client.sendall(b"hello?")
            with pytest.raises(TimeoutError):
                client.recv(1)
            proxy.mend()
            client.settimeout(DEADLINE_S)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert exchange(proxy, b"after") == b"after"
    assert len(server.received) == 1


def test_a_drop_comes_after_so_many_bytes_and_once(sink: Server) -> None:
    with Proxy("127.0.0.1", sink.port) as proxy:
        with connect(proxy) as bystander, connect(proxy) as client:
            bystander.sendall(b"x")
            wait(lambda: proxy.bytes_up == 1)
            proxy.drop_after(100_001)
            client.sendall(bytes(100_000))
            wait(lambda: proxy.bytes_up == 100_001)
            assert proxy.connections == 2
            client.sendall(bytes(5))
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            assert proxy.bytes_up == 100_002
            wait(lambda: proxy.connections == 1)
            bystander.sendall(bytes(200_000))
            wait(lambda: proxy.bytes_up == 300_002)
            assert proxy.connections == 1
        with pytest.raises(ValueError, match="at least one"):
            proxy.drop_after(0)


def test_a_break_on_one_side_is_a_break_on_the_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy("127.0.0.1", listener.getsockname()[1]) as proxy:
        with connect(proxy) as client:
            peer, _ = listener.accept()
            client.sendall(b"not read")
            wait(lambda: proxy.bytes_up == 8)
            peer.close()  # with unread bytes: a reset
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        wait(lambda: proxy.connections == 0)


def test_without_a_server_a_client_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # The reset may come while the client still connects, or after.
    with Proxy("127.0.0.1", port) as proxy, pytest.raises(ConnectionError), connect(proxy) as client:
        client.recv(1)


@pytest.mark.parametrize("state", ["idle", "throttled", "stalled", "delayed", "full", "black hole"])
def test_closing_ends_every_thread_whatever_goes_on(sink: Server, state: str) -> None:
    proxy = Proxy("127.0.0.1", sink.port)
    client = connect(proxy)
    wait(lambda: proxy.connections == 1)
    {
        "idle": lambda: None,
        "throttled": lambda: proxy.throttle(0.001),
        "stalled": proxy.stall,
        "delayed": lambda: proxy.delay(1000),
        "full": lambda: proxy.throttle(10_000_000),
        "black hole": lambda: proxy.cut(blackhole=True),
    }[state]()
    client.settimeout(0.2)
    try:
        client.sendall(bytes(20 * MIB if state == "full" else 1000))
    except OSError:
        assert state in ("full", "black hole")
    proxy.close()
    assert proxy._threads and not any(thread.is_alive() for thread in proxy._threads)
    client.close()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
