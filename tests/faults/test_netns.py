"""The lossy line loses, delays and forgets what it is told to, and otherwise changes no byte."""

from __future__ import annotations

import hashlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from tests.faults.netns import LossyLine, why_not

DEADLINE_S = 30.0
DATA = random.Random(3).randbytes(400_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
# Connects, and for each line on its input sends as many bytes as that says.
SENDER = f"""
import random, socket, sys
data = random.Random(3).randbytes({len(DATA)})
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout={DEADLINE_S})
sent = 0
for line in sys.stdin:
    connection.sendall(data[sent : sent + int(line)])
    sent += int(line)
"""


@pytest.fixture
def line() -> Iterator[LossyLine]:
    if reason := why_not():
        pytest.skip(reason)
    with LossyLine(seed=2) as line:
        yield line


class Sender:
    """A program at the far end, and our end of its connection."""

    def __init__(self, line: LossyLine, listener: socket.socket) -> None:
        port = str(listener.getsockname()[1])
        command = [*line.command, sys.executable, "-c", SENDER, line.address, port]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.connection, _ = listener.accept()
        self.connection.settimeout(0.05)
        self.received = bytearray()

    def send(self, count: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"%d\n" % count)
        self.process.stdin.flush()

    def has(self, count: int) -> bool:
        """Whether so many bytes are here; looks for more."""
        with suppress(TimeoutError):
            self.received += self.connection.recv(2**20)
        return len(self.received) >= count

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.communicate()


@contextmanager
def sender(line: LossyLine) -> Iterator[Callable[[], Sender]]:
    made: list[Sender] = []
    with socket.create_server((line.address, 0)) as listener:
        listener.settimeout(DEADLINE_S)

        def make() -> Sender:
            made.append(Sender(line, listener))
            return made[-1]

        try:
            yield make
        finally:
            for one in made:
                one.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it did not come to that"


def test_bytes_arrive_unchanged_though_packets_are_lost_and_late(line: LossyLine) -> None:
    line.loses(0.1)
    line.delays(0.02)
    line.carries(2_000_000)
    with sender(line) as make:
        one = make()
        one.send(len(DATA))
        until(lambda: one.has(len(DATA)))
        assert hashlib.sha256(one.received).hexdigest() == SHA256
        assert line.lost["up"] > 5
        assert line.packets["up"] > len(DATA) / 1500


def test_what_vanishes_comes_when_the_line_is_mended(line: LossyLine) -> None:
    with sender(line) as make:
        one = make()
        one.send(1000)
        until(lambda: one.has(1000))
        line.vanish()
        lost = line.lost["up"]
        one.send(1000)
        until(lambda: line.lost["up"] >= lost + 3)  # it was sent, again and again
        assert not one.has(1001)
        line.mend()
        until(lambda: one.has(2000))
        assert one.received == DATA[:2000]


def test_a_connection_that_was_forgotten_leads_nowhere_and_a_new_one_does(line: LossyLine) -> None:
    with sender(line) as make:
        old = make()
        old.send(1000)
        until(lambda: old.has(1000))
        line.forget()
        lost = line.lost["up"]
        old.send(1000)
        until(lambda: line.lost["up"] >= lost + 3)
        new = make()
        new.send(3000)
        until(lambda: new.has(3000))
        assert not old.has(1001)
        assert new.received == DATA[:3000]
