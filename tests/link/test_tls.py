"""Bytes cross whole, and whoever is slow costs no more time than was granted."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.authorities import authority_with

from photon.identity import client_context, server_context
from photon.link.tls import GIVE_BYTES, TAKE_BYTES, TlsSession, TlsStream

DEADLINE_S = 20.0
MIB = 2**20


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority_with(tmp_path_factory.mktemp("tls") / "keys", "ada")


class Meagre(socket.socket):
    """Takes at most `most` bytes with one call; remembers what it was offered."""

    most = 2**30

    def __init__(self, other: socket.socket) -> None:
        super().__init__(fileno=other.detach())
        self.offered: list[list[int]] = []
        self.taken = 0

    def sendmsg(self, buffers: Iterable[Any], *_: Any) -> int:
        pieces = [bytes(buffer) for buffer in buffers]
        self.offered.append([len(piece) for piece in pieces])
        count = self.send(b"".join(pieces)[: self.most])
        self.taken += count
        return count


@contextmanager
def connected(
    keys: Path,
    serve: Callable[[TlsStream], None],
    timeout_s: float = DEADLINE_S,
    kind: Callable[[socket.socket], socket.socket] = lambda sock: sock,
) -> Iterator[TlsStream]:
    """The client's end of a connection; the server's is in a thread, in `serve`, until the block ends."""
    pair = socket.socketpair()
    ours, theirs = kind(pair[0]), pair[1]
    ours.settimeout(timeout_s)
    theirs.settimeout(DEADLINE_S)

    def run() -> None:
        with closing(TlsStream(theirs, TlsSession(server_context(keys)))) as stream:
            stream.handshake()
            serve(stream)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with closing(TlsStream(ours, TlsSession(client_context(keys / "ada.key"), "localhost"))) as stream:
        stream.handshake()
        yield stream
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def read(stream: TlsStream, size: int) -> bytes:
    found, buffer = b"", memoryview(bytearray(100_000))
    while len(found) < size and (count := stream.recv_into(buffer)):
        found += buffer[:count]
    return found


@pytest.mark.parametrize("size", [1, 16384, 16385, TAKE_BYTES + 1, 3 * MIB])
def test_bytes_come_back_as_they_were_sent(keys: Path, size: int) -> None:
    data = bytes(number * 7 % 251 for number in range(size))

    def echo(stream: TlsStream) -> None:
        certificate = stream.session.peer_certificate()
        assert certificate is not None
        assert "ada" in str(certificate["subject"])
        found = read(stream, size)
        stream.session.unread(found[:10])
        assert read(stream, min(10, size)) == found[:10]
        stream.sendall(found)

    with connected(keys, echo) as stream:
        stream.sendall(data)
        assert read(stream, size) == data
        assert read(stream, 1) == b""  # the other end has closed
        assert stream.taken_bytes > size
        assert stream.given_bytes > size


@pytest.mark.parametrize("most", [1009, 65_536, 66_000, 200_003])
def test_a_kernel_that_takes_less_than_it_was_offered_gets_the_rest_in_order(keys: Path, most: int) -> None:
    data = random.Random(0).randbytes(TAKE_BYTES + 150_000)
    found = bytearray()

    def take(stream: TlsStream) -> None:
        found.extend(read(stream, len(data)))

    with connected(keys, take, kind=Meagre) as stream:
        assert isinstance(stream.sock, Meagre)
        stream.sock.most = most
        stream.sendall(data)
        assert stream.given_bytes == stream.sock.taken
    assert bytes(found) == data


def test_one_call_hands_over_many_pieces_that_were_encrypted_one_by_one(keys: Path) -> None:
    def take(stream: TlsStream) -> None:
        read(stream, 2 * GIVE_BYTES)

    with connected(keys, take, kind=Meagre) as stream:
        assert isinstance(stream.sock, Meagre)
        stream.sock.offered.clear()
        stream.sendall(bytes(2 * GIVE_BYTES))
        whole = [offer for offer in stream.sock.offered if sum(offer) > GIVE_BYTES]
        assert len(whole) == 2
        assert all(2**16 < piece < 2**16 + 500 for offer in whole for piece in offer)


def test_a_reader_outlives_its_connection(keys: Path) -> None:
    with connected(keys, lambda stream: stream.sendall(b"one\ntwo")) as stream:
        file = stream.makefile("rb")
        assert file.readline() == b"one\n"
        stream.close()
        buffer = memoryview(bytearray(10))
        assert file.readinto(buffer) == 3
        file.close()
        assert stream.fileno() == -1


def test_a_byte_now_and_then_does_not_make_a_wait_longer(keys: Path) -> None:
    def drip(stream: TlsStream) -> None:
        stream.session.write(bytes(10_000))
        for byte in stream.session.outgoing():
            time.sleep(0.1)
            try:
                stream.sock.send(bytes([byte]))
            except OSError:
                return

    with connected(keys, drip, timeout_s=0.5) as stream:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            read(stream, 1)
        assert time.monotonic() - began < DEADLINE_S / 2
        assert stream.sock.gettimeout() == 0.5


def test_who_reads_slowly_is_not_waited_for(keys: Path) -> None:
    over = threading.Event()

    def sip(stream: TlsStream) -> None:
        while not over.wait(0.01):
            stream.sock.recv(1)

    with connected(keys, sip, timeout_s=0.5) as stream:
        try:
            with pytest.raises(TimeoutError):
                stream.sendall(bytes(8 * MIB))
        finally:
            over.set()


def test_who_takes_a_little_now_and_then_is_not_waited_for_longer(keys: Path) -> None:
    over = threading.Event()

    def nibble(stream: TlsStream) -> None:
        while not over.wait(0.1):
            stream.sock.recv(2**15)  # enough that the kernel takes more within each wait

    with connected(keys, nibble, timeout_s=0.5) as stream:
        began = time.monotonic()
        try:
            with pytest.raises(TimeoutError):
                stream.sendall(bytes(4 * MIB))
        finally:
            over.set()
        assert time.monotonic() - began < DEADLINE_S / 2
        assert stream.sock.gettimeout() == 0.5


def test_a_refused_handshake_is_told_to_the_other_end(keys: Path) -> None:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.settimeout(DEADLINE_S)
    refused: list[Exception] = []

    def serve() -> None:
        with closing(TlsStream(theirs, TlsSession(server_context(keys)))) as stream:
            try:
                stream.handshake()
            except ssl.SSLError as error:
                refused.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    with closing(TlsStream(ours, TlsSession(context, "localhost"))) as stream:
        stream.handshake()
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
            read(stream, 1)
    thread.join(DEADLINE_S)
    assert len(refused) == 1
