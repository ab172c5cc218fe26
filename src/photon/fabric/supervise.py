"""Child processes that are kept alive: started again when they end by themselves, gone when this process is gone.

A child is told by a socket: when its other end closes, however this process ended, the child ends itself
(`photon.fabric.worker.end_with`). A child that dies is started again after a pause that doubles up to a limit and
begins anew once it has stayed up for a while.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import IO

_LOOK_S = 0.25
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_STEADY_S = 60.0  # a child that lived so long has started well
_END_S = 10.0
_LOG_BYTES = 16 * 2**20


@dataclass
class Child:
    """One process: its command (to which `--socket FD` is added), its environment and the file its output goes to."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    started_at: float = 0.0
    pause_s: float = _FIRST_PAUSE_S  # before the last start
    start_at: float | None = None  # monotonic: when a child that ended is started again
    socket: socket.socket | None = field(default=None, repr=False)


class Supervisor:
    """Starts `children` in order, and looks after them on a thread until `close`."""

    def __init__(self, children: Sequence[Child]) -> None:
        self.children = list(children)
        self._closing, self._lock = Event(), Lock()
        for child in self.children:
            self._start(child)
        self._thread = Thread(target=self._look_after, name="photon-supervisor", daemon=True)
        self._thread.start()

    def process_id(self, name: str) -> int | None:
        """The process of a child; None while it is down."""
        with self._lock:
            child = next(child for child in self.children if child.name == name)
            return child.process.pid if child.process is not None and child.process.poll() is None else None

    def close(self, deadline_s: float = _END_S) -> None:
        """Ask all of them to end, then end them."""
        self._closing.set()
        self._thread.join(_END_S)
        with self._lock:
            running = [child for child in reversed(self.children) if child.process is not None]
            for child in running:
                _signal(child, signal.SIGTERM)
            end = time.monotonic() + deadline_s
            for child in running:
                self._end(child, max(0.0, end - time.monotonic()))

    def _start(self, child: Child) -> None:
        with _open_log(child.log) as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {child.name} starting\n".encode())
            log.flush()
            child.process, child.socket = start_child(child.command, child.environment, log)
        child.started_at = time.monotonic()

    def _look_after(self) -> None:
        while not self._closing.wait(_LOOK_S):
            for child in self.children:
                if child.start_at is None and child.process is not None and child.process.poll() is not None:
                    self._end(child, 0.0)
                    lived_s = time.monotonic() - child.started_at
                    child.pause_s = _FIRST_PAUSE_S if lived_s > _STEADY_S else min(2 * child.pause_s, _LONGEST_PAUSE_S)
                    child.start_at = time.monotonic() + child.pause_s  # meanwhile the others are looked after
                if child.start_at is not None and time.monotonic() >= child.start_at:
                    self._start_again(child)

    def _start_again(self, child: Child) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            try:
                child.restarts += 1
                self._start(child)
                child.start_at = None
            except OSError:  # no memory, no disk: it may be there later
                child.start_at = time.monotonic() + child.pause_s

    def _end(self, child: Child, deadline_s: float) -> None:
        process = child.process
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(deadline_s)
        _signal(child, signal.SIGKILL)  # and whatever it has started
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        if child.socket is not None:
            child.socket.close()


def start_child(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a command (with `--socket FD`) in a process group of its own; it ends when the socket given back closes.

    `output` None: it writes where we write.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603  # our own commands
            _with_socket(command, theirs.fileno()),
            env=dict(environment),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # Ctrl-C reaches us alone
        )
    return process, ours


def free_port() -> int:
    """A TCP port of this machine's loopback that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _with_socket(command: Sequence[str], descriptor: int) -> list[str]:
    """`--socket FD` stands before a `--`, behind which a command keeps its own arguments."""
    at = command.index("--") if "--" in command else len(command)
    return [*command[:at], "--socket", str(descriptor), *command[at:]]


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None:
        with suppress(ProcessLookupError, PermissionError):  # both mean: gone
            os.killpg(child.process.pid, number)


def _open_log(path: Path) -> IO[bytes]:
    """The log, opened for appending; one that has grown large becomes `.old` first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_name(f"{path.name}.old"))
    return path.open("ab")
