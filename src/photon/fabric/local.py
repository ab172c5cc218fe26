"""Fabric `local`: every node of the federation on this machine, in worker processes that share nothing but bytes.

One worker per GPU, or one single-threaded worker per CPU core: on a CPU that is faster than one multi-threaded
process, and two threads beside one other busy process can fall ten-fold (threads and glibc's allocator thresholds are
therefore set in each worker's environment). A worker that dies is started again and its task repeated; after
MAX_ATTEMPTS the node is reported lost and the round goes on without it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from photon.errors import FabricError
from photon.events import NodeProgress
from photon.fabric.base import Arrival, FabricEvent, Lost, NodeInfo
from photon.node.device import WorkerPlan, worker_environment

MAX_ATTEMPTS = 3
PROGRESS, REPLY = b"P", b"R"  # what a frame from a worker holds; a reply follows in a frame of its own
_STALL_S = 60  # one read or write of a pipe may stall this long before the worker counts as dead
_STOP_S = 5.0
_LOG_TAIL_BYTES = 1500
_FRAME_SLACK_BYTES = 2**21


@dataclass
class _Job:
    node: str
    message: bytes
    attempts: int = 0


@dataclass
class _Worker:
    plan: WorkerPlan
    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path
    job: _Job | None = None
    alive: bool = True


@dataclass
class LocalFabric:
    """Runs `infos` on workers as planned. `devices` pins a node to one device (a silo's own `device`)."""

    run_folder: Path
    infos: list[NodeInfo]
    plans: list[WorkerPlan]
    logs: Path
    max_payload_bytes: int
    devices: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._queue: deque[_Job] = deque()
        self._events: deque[FabricEvent] = deque()
        self._closed = False
        self.logs.mkdir(parents=True, exist_ok=True)
        self._workers = [self._start(index, plan) for index, plan in enumerate(self.plans)]

    @property
    def slots(self) -> int:
        """Worker processes."""
        return len(self.plans)

    def nodes(self) -> list[NodeInfo]:
        """Every virtual node; they are always reachable."""
        return self.infos

    def send(self, node: str, message: bytes) -> None:
        """Queue a task; the next free worker of the right device takes it."""
        if self._closed:
            raise FabricError("the local fabric is closed")
        if all(info.name != node for info in self.infos):
            raise FabricError(f"no node is called {node!r}")
        self._queue.append(_Job(node, message))
        self._dispatch()

    def receive(self, timeout_s: float) -> FabricEvent | None:
        """The next event, or None after `timeout_s`. A dead worker is noticed here and replaced."""
        if self._closed:
            raise FabricError("the local fabric is closed")
        if not self._events:
            ready = wait([worker.connection for worker in self._workers if worker.alive], timeout_s)
            for worker in self._workers:
                if worker.alive and worker.connection in ready:
                    self._read(worker)
            self._dispatch()
        return self._events.popleft() if self._events else None

    def abandon(self, node: str) -> None:
        """Drop the node's task; a worker in the middle of it is ended and replaced."""
        self._queue = deque(job for job in self._queue if job.node != node)
        for worker in self._workers:
            if worker.job is not None and worker.job.node == node:
                self._retire(worker)
        self._dispatch()

    def close(self) -> None:
        """End every worker; they finish by themselves when their socket closes, or are killed after a moment."""
        self._closed = True
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            _end(worker.process)
        self._workers = []

    def _start(self, index: int, plan: WorkerPlan) -> _Worker:
        ours, theirs = socket.socketpair()
        stall = struct.pack("ll", _STALL_S, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, stall)
        arguments = {"socket": theirs.fileno(), "run": self.run_folder, "device": plan.device, "threads": plan.threads}
        command = [sys.executable, "-m", "photon.fabric.worker"]
        command += [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
        log = self.logs / f"worker-{index}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603  # our own module, our own arguments
                command,
                env=worker_environment(plan, os.environ),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches us alone; we end the workers in order
            )
        theirs.close()
        return _Worker(plan, process, Connection(ours.detach()), log)

    def _dispatch(self) -> None:
        for index, worker in enumerate(self._workers):
            job = next((job for job in self._queue if self._may_run(job.node, worker)), None)
            if job is None or worker.job is not None:
                continue
            self._queue.remove(job)
            if not worker.alive:  # started again only for work, so that one that cannot start uses up attempts
                self._workers[index] = self._start(index, worker.plan)
            self._hand_over(self._workers[index], job)

    def _may_run(self, node: str, worker: _Worker) -> bool:
        return self.devices.get(node, worker.plan.device) == worker.plan.device

    def _hand_over(self, worker: _Worker, job: _Job) -> None:
        job.attempts += 1
        worker.job = job
        # A failed write is a dead worker: its socket will be at its end, and `receive` deals with it.
        with contextlib.suppress(OSError):
            worker.connection.send_bytes(job.message)

    def _read(self, worker: _Worker) -> None:
        try:
            kind = worker.connection.recv_bytes(_FRAME_SLACK_BYTES)
            if kind[:1] == PROGRESS:
                self._events.append(NodeProgress.model_validate_json(kind[1:]))
                return
            reply = worker.connection.recv_bytes(self.max_payload_bytes + _FRAME_SLACK_BYTES)
        except (EOFError, OSError):
            self._died(worker)
            return
        job, worker.job = worker.job, None
        if job is not None:
            self._events.append(Arrival(job.node, reply))

    def _died(self, worker: _Worker) -> None:
        job = worker.job
        self._retire(worker)
        if job is None:
            return
        if job.attempts < MAX_ATTEMPTS:
            self._queue.appendleft(job)
            self._events.append(
                NodeProgress(node=job.node, round=0, state="waiting", note="worker died; starting again")
            )
        else:
            self._events.append(Lost(job.node, f"its worker died {job.attempts} times; {_tail(worker.log)}"))

    def _retire(self, worker: _Worker) -> None:
        worker.alive, worker.job = False, None
        worker.connection.close()
        worker.process.kill()
        _end(worker.process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_S)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return f"{log} ends: {' | '.join(lines[-5:])}" if lines else f"{log} is empty"
