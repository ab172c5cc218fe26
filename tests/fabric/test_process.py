"""What a worker process says comes out of its owner's queue, in order; what is none of it ends the worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from photon.events import NodeProgress
from photon.fabric.process import Ended, Replied, Signal, WorkerProcess, Written
from photon.link.body import FileBody
from photon.link.update import Sealed

DEADLINE_S = 20.0
SPEAK = """
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from photon.events import NodeProgress
from photon.fabric.process import PROGRESS, READY, REPLY, receive_message, send_message, send_written
from photon.link.body import FileBody
from photon.link.update import Sealed
connection = Connection(int(sys.argv[sys.argv.index("--socket") + 1]))
body = FileBody(Path("/a/b"), 3, 5)
connection.send_bytes(READY)
task = receive_message(connection)
"""
GOOD = """
connection.send_bytes(PROGRESS + NodeProgress(node="ada", round=1, state="training").model_dump_json().encode())
send_written(connection, body, "f" * 64)
connection.send_bytes(REPLY)
send_message(connection, Sealed(bytes(task), body))
"""
STRANGE = "connection.send_bytes(b'?' * 30)\n"


@contextmanager
def speaking(words: str, folder: Path) -> Iterator[SimpleQueue[tuple[WorkerProcess, Signal]]]:
    signals: SimpleQueue[tuple[WorkerProcess, Signal]] = SimpleQueue()
    with (folder / "log").open("wb") as log:
        worker = WorkerProcess([sys.executable, "-c", SPEAK + words], {}, log, 2**20, signals)
    try:
        worker.give(Sealed(b"a task", b""))
        yield signals
    finally:
        worker.kill()
        worker.wait()


def test_an_update_is_told_before_the_reply_it_belongs_to(tmp_path: Path) -> None:
    with speaking(GOOD, tmp_path) as signals:
        told = [signals.get(timeout=DEADLINE_S)[1] for _ in range(3)]
    body = FileBody(Path("/a/b"), 3, 5)
    assert isinstance(told[0], NodeProgress)
    assert told[1] == Written(body, "f" * 64)
    assert told[2] == Replied(Sealed(b"a task", body), is_last=False)


@pytest.mark.parametrize(
    "words",
    [
        STRANGE,
        "connection.send_bytes(b'W{')\n",
        "connection.send_bytes(b'W{}')\n",
        "connection.send_bytes(b'R'); connection.send_bytes(b'F{}')\n",
    ],
)
def test_a_frame_that_is_none_of_ours_ends_it(words: str, tmp_path: Path) -> None:
    with speaking(words, tmp_path) as signals:
        assert isinstance(signals.get(timeout=DEADLINE_S)[1], Ended)
