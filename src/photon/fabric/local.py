"""Fabric `local`: every node of the federation on this machine, in worker processes that share nothing but bytes.

One worker per GPU, or one single-threaded worker per CPU core: on a CPU that is faster than one multi-threaded
process, and two threads beside one other busy process can fall ten-fold (threads and glibc's allocator thresholds are
therefore set in each worker's environment). Each worker has a place; a worker that dies is started again there and its
task repeated, and a place where no worker can start is given up. A node is lost when its task has killed
`MAX_ATTEMPTS` workers, or no place is left for it; the round goes on without it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from photon.errors import FabricError
from photon.events import NodeProgress
from photon.fabric.base import Arrival, FabricEvent, Lost, NodeInfo
from photon.fabric.process import Ended, Signal, WorkerProcess, Written
from photon.link.update import Sealed
from photon.node.device import WorkerPlan, worker_environment

MAX_ATTEMPTS = 3  # of a task, and of starting a worker
WORKER = (sys.executable, "-m", "photon.fabric.worker")
_LOG_TAIL_BYTES = 1500
_LOG_TAIL_LINES = 5
_HEADER_BYTES = 2**21  # what a reply may hold beside its tensors


@dataclass
class _Job:
    node: str
    message: Sealed
    attempts: int = 0


@dataclass
class _Place:
    """Where one worker runs: a device and a log. The worker comes and goes."""

    plan: WorkerPlan
    log: Path
    worker: WorkerProcess | None = None
    job: _Job | None = None
    failed_starts: int = 0  # in a row
    last_death: str = ""

    @property
    def is_given_up(self) -> bool:
        return self.failed_starts >= MAX_ATTEMPTS


@dataclass
class LocalFabric:
    """Runs `infos` on workers as planned. `devices` limits a node to some torch devices (a silo's own `device`).

    Not for use by several threads. `worker` is the command of a worker, to which its arguments are added.
    """

    run_folder: Path
    infos: Sequence[NodeInfo]
    plans: Sequence[WorkerPlan]
    logs: Path
    max_payload_bytes: int
    devices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    worker: Sequence[str] = WORKER

    def __post_init__(self) -> None:
        self._queue: deque[_Job] = deque()
        self._signals: SimpleQueue[tuple[WorkerProcess, Signal]] = SimpleQueue()
        self._lost: deque[Lost] = deque()
        self._closed = False
        self.logs.mkdir(parents=True, exist_ok=True)
        self._places = [_Place(plan, self.logs / f"worker-{index}.log") for index, plan in enumerate(self.plans)]
        try:
            for place in self._places:  # all at once: a worker takes seconds to import what it needs
                place.worker = self._start(place)
        except BaseException:
            self.close()
            raise

    @property
    def slots(self) -> int:
        """Worker processes."""
        return len(self.plans)

    def nodes(self) -> list[NodeInfo]:
        """Every virtual node; they are always reachable."""
        return list(self.infos)

    def send(self, node: str, message: Sealed) -> None:
        """Queue a task; the next free worker of a right device takes it."""
        if self._closed:
            raise FabricError("the local fabric is closed")
        if all(info.name != node for info in self.infos):
            raise FabricError(f"no node is called {node!r}")
        self._queue.append(_Job(node, message))
        self._dispatch()

    @property
    def foretells(self) -> bool:
        """No: a worker waits for nothing that another of this machine's cores would not do meanwhile."""
        return False

    def foretell(self, node: str, message: Sealed) -> None:
        """Nobody needs to know."""

    def receive(self, timeout_s: float) -> FabricEvent | None:
        """The next event, or None after `timeout_s`. Raises FabricError if a dead worker cannot be replaced.

        Tasks are handed out here and in `send`, so no more replies wait to be received than there are workers.
        """
        if self._closed:
            raise FabricError("the local fabric is closed")
        end = time.monotonic() + timeout_s
        while not self._lost:
            try:
                worker, signal = self._signals.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                return None
            place = next((place for place in self._places if place.worker is worker), None)
            if place is None:
                continue  # the last words of a worker that was ended
            event = self._take(place, signal)
            self._dispatch()
            if event is not None:
                return event
        return self._lost.popleft()

    def abandon(self, node: str) -> None:
        """Drop the node's task; a worker in the middle of it is ended and replaced when there is work for it."""
        self._queue = deque(job for job in self._queue if job.node != node)
        for place in self._places:
            if place.job is not None and place.job.node == node:
                self._end(place, "it did not answer in time")
        self._dispatch()

    def carried(self) -> None:
        """Nothing: what passes between processes of one machine is its messages."""

    def close(self) -> None:
        """End every worker. What they were doing is lost, and was not committed."""
        self._closed = True
        workers = [place.worker for place in self._places if place.worker is not None]
        for place in self._places:
            place.worker, place.job = None, None
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()

    def _start(self, place: _Place) -> WorkerProcess:
        command = worker_command(self.worker, self.run_folder, place.plan)
        environment = worker_environment(place.plan, os.environ)
        try:
            with place.log.open("ab") as output:
                output.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} starting on {place.plan.device}\n".encode())
                output.flush()
                return WorkerProcess(
                    command, environment, output, self.max_payload_bytes + _HEADER_BYTES, self._signals
                )
        except OSError as error:
            raise FabricError(f"a worker process cannot be started ({error}); resume when that is mended") from error

    def _dispatch(self) -> None:
        """Give every free place its next task, and give up the tasks that no place is left for."""
        for place in self._places:
            if place.job is None and place.worker is not None and place.worker.died_idle:
                self._end(place)
            if place.job is not None or place.is_given_up:
                continue
            job = next((job for job in self._queue if self._may_run(job.node, place)), None)
            if job is not None:
                self._queue.remove(job)
                place.job = job
                if place.worker is None:
                    place.worker = self._start(place)
                place.worker.give(job.message)
        for job in list(self._queue):
            places = [place for place in self._places if self._may_run(job.node, place)]
            if all(place.is_given_up for place in places):
                self._queue.remove(job)
                reason = places[-1].last_death if places else f"none was planned on {self.devices[job.node]}"
                self._lost.append(Lost(job.node, f"no worker can be started for it: {reason}"))

    def _may_run(self, node: str, place: _Place) -> bool:
        return node not in self.devices or place.plan.device in self.devices[node]

    def _take(self, place: _Place, signal: Signal) -> FabricEvent | None:
        """Act on what a worker said."""
        if isinstance(signal, NodeProgress):
            return signal
        if isinstance(signal, Written):
            return None  # of use to who sends it over a network
        if isinstance(signal, Ended):
            return self._died(place, signal.reason)
        job, place.job = place.job, None
        place.failed_starts = 0
        if signal.is_last:
            self._end(place)
        return Arrival(job.node, signal.message) if job is not None else None

    def _died(self, place: _Place, reason: str) -> FabricEvent | None:
        job = place.job
        was_ready = self._end(place, reason)
        if job is None:
            return None
        job.attempts += was_ready
        if job.attempts >= MAX_ATTEMPTS:
            return Lost(job.node, f"its worker died {job.attempts} times; {place.last_death}")
        self._queue.appendleft(job)
        return NodeProgress(node=job.node, round=0, state="waiting", note="its worker died; starting another")

    def _end(self, place: _Place, reason: str = "") -> bool:
        """Make sure that the place's worker is gone; says whether it had ever been ready for work."""
        worker, place.worker, place.job = place.worker, None, None
        if worker is None:
            return False
        worker.kill()
        status = worker.wait()
        if not worker.is_ready:
            place.failed_starts += 1
        place.last_death = ", ".join(part for part in (reason, status, _tail(place.log)) if part)
        return worker.is_ready


def worker_command(worker: Sequence[str], run: Path, plan: WorkerPlan) -> list[str]:
    """What starts a worker process on the run folder `run`."""
    return [*worker, "--run", str(run), "--device", plan.device, "--threads", str(plan.threads)]


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return f"{log} ends: {' | '.join(line.strip() for line in lines[-_LOG_TAIL_LINES:])}"
