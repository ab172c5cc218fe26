"""One worker process as its owner sees it: the process, a socket to it, and a thread that alone uses that socket.

The thread may wait on a worker that is still importing, that trains for hours or that hangs in the middle of a reply;
nobody else waits with it. It says what it learns on a queue and ends when the worker ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import IO

from pydantic import TypeAdapter

from photon.errors import PhotonError
from photon.events import NodeProgress
from photon.link.body import FileBody
from photon.link.update import Sealed, Serialised

# What a frame from a worker begins with. A serialised reply follows REPLY and LAST.
READY, PROGRESS, WRITTEN, REPLY, LAST = b"S", b"P", b"W", b"R", b"L"
# A message whose body lies in a file crosses as two frames: where the body is, and the head.
_IN_FILE = b"F"
_CONTROL_BYTES = 2**16
_END_S = 5.0  # a killed process is gone at once, unless the kernel holds it


class TrainingDiedError(PhotonError):
    """The process that trains ended by itself."""


@dataclass(frozen=True)
class Written:
    """The update of the reply that will follow lies in a file; `sha256` is that of its bytes."""

    body: FileBody
    sha256: str


@dataclass(frozen=True)
class Replied:
    """A serialised reply; after the `is_last` one the worker takes no more tasks."""

    message: Serialised
    is_last: bool


@dataclass(frozen=True)
class Ended:
    """The worker cannot be talked to any more."""

    reason: str


Signal = NodeProgress | Written | Replied | Ended
_PLACE, _UPDATE = TypeAdapter(FileBody), TypeAdapter(Written)


def send_message(connection: Connection, message: Sealed) -> None:
    """Send a message; a body that lies in a file stays there, and the other end is told where."""
    if isinstance(message.body, FileBody):
        connection.send_bytes(_IN_FILE + _PLACE.dump_json(message.body))
        connection.send_bytes(message.head)
    else:
        connection.send_bytes(message.joined())  # one copy per worker, not per node


def receive_message(connection: Connection, max_bytes: int | None = None) -> Serialised:
    """What `send_message` sent. Raises OSError if it is longer than `max_bytes`, ValueError if it is malformed."""
    frame = connection.recv_bytes(max_bytes)
    if frame[:1] != _IN_FILE:
        return frame
    place = _PLACE.validate_json(frame[1:])
    return Sealed(connection.recv_bytes(max_bytes), place)


def send_written(connection: Connection, body: FileBody, sha256: str) -> None:
    """Say where the update of the coming reply lies, before the reply."""
    connection.send_bytes(WRITTEN + _UPDATE.dump_json(Written(body, sha256)))


class WorkerProcess:
    """Starts `command --socket N` in a process group of its own; signals come out of the queue as (self, signal).

    Raises OSError if it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: IO[bytes],
        max_reply_bytes: int,
        signals: SimpleQueue[tuple[WorkerProcess, Signal]],
    ) -> None:
        self.is_ready = False  # it has imported and built what it needs
        self._max_reply_bytes, self._signals = max_reply_bytes, signals
        self._tasks: SimpleQueue[Sealed | None] = SimpleQueue()
        ours, theirs = socket.socketpair()
        with ours, theirs:  # theirs must not stay open here: a dead worker is known by the end of its socket
            self._process = subprocess.Popen(  # noqa: S603  # our own module, our own arguments
                [*command, "--socket", str(theirs.fileno())],
                env=dict(environment),
                pass_fds=[theirs.fileno()],  # and no other: one worker must not hold the socket of another open
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C reaches us alone; and what the worker starts can be ended with it
            )
            self._connection = Connection(ours.detach())
        self._thread = Thread(target=self._talk, name="photon-worker", daemon=True)
        self._thread.start()

    def give(self, task: Sealed) -> None:
        """Hand over a serialised task; only when the one before has been answered."""
        self._tasks.put(task)

    @property
    def died_idle(self) -> bool:
        """Whether it died without a task; while it starts or works, a signal says so instead."""
        return self.is_ready and self._process.poll() is not None

    def ask_to_hand_in(self) -> None:
        """Ask it to stop training after the step at hand and to reply with what it has; asking again does no harm."""
        self._signal(signal.SIGTERM)

    def ask_to_drop(self) -> None:
        """Ask it to stop training and to forget the task at hand; asking again does no harm."""
        self._signal(signal.SIGUSR1)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_ready and self._process.poll() is None:  # before it is ready, a signal would end it
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it and whatever it started, now. Its commits are atomic, so there is nothing to wait for."""
        self._tasks.put(None)
        if self._process.returncode is None:  # until it is waited for, its number belongs to no other process
            with contextlib.suppress(ProcessLookupError, PermissionError):  # both mean: already dead
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> str:
        """After `kill`: see it gone, and say how it ended."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "cannot be killed: the kernel holds it"
        self._thread.join(_END_S)
        if code >= 0:
            return f"exit code {code}"
        return f"ended by {signal.Signals(-code).name}"

    def _talk(self) -> None:
        try:
            self._expect_ready()
            self.is_ready = True
            while (task := self._tasks.get()) is not None:
                send_message(self._connection, task)
                del task
                self._signals.put((self, self._reply()))
        except (EOFError, OSError, ValueError) as error:  # ValueError: a frame that is none of ours
            self._signals.put((self, Ended(str(error))))
        finally:
            self._connection.close()

    def _expect_ready(self) -> None:
        frame = self._connection.recv_bytes(_CONTROL_BYTES)
        if frame != READY:
            raise ValueError(f"it began with {frame[:20]!r}")

    def _reply(self) -> Replied:
        while True:
            frame = self._connection.recv_bytes(_CONTROL_BYTES)
            if frame in (REPLY, LAST):
                return Replied(receive_message(self._connection, self._max_reply_bytes), frame == LAST)
            if frame[:1] == WRITTEN:
                self._signals.put((self, _UPDATE.validate_json(frame[1:])))
            elif frame[:1] == PROGRESS:
                self._signals.put((self, NodeProgress.model_validate_json(frame[1:])))
            else:
                raise ValueError(f"it said {frame[:20]!r}")
