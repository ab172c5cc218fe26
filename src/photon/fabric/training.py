"""The trainer of a site: a worker process that stays, so that model, optimizer and compiled graph are warm.

It is started again when it dies, and ended when it does not obey. One thread runs tasks; others may tell it to stop.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock
from typing import NoReturn

from photon.events import NodeProgress
from photon.fabric.discretion import say, without_secrets
from photon.fabric.local import WORKER, worker_command
from photon.fabric.process import Ended, Signal, TrainingDiedError, WorkerProcess, Written
from photon.link.body import Body
from photon.link.update import MAX_HEADER_BYTES, Sealed, Task, seal
from photon.node.device import WorkerPlan, worker_environment
from photon.runfolder import RunFolder

MAX_ATTEMPTS = 3  # of one task, when its worker dies
_WORKER_START_S = 600.0
_OBEY_S = 600.0  # a trainer obeys after the step or the score at hand, be it the one that compiles the model
_POLL_S = 0.5
_LEAST_TRAINING_S = 1.0


class DroppedError(Exception):
    """The task at hand is not wanted any more."""


class Training:
    """Runs tasks on the run folder of a prepared run."""

    def __init__(self, folder: RunFolder, plan: WorkerPlan) -> None:
        self._folder, self._plan = folder, plan
        self._lock = Lock()  # of the fields
        self._signals: SimpleQueue[tuple[WorkerProcess, Signal]] = SimpleQueue()
        self._worker: WorkerProcess | None = None
        self._is_busy = self._is_closed = False

    def warm_up(self) -> None:
        """Start the worker, if that succeeds; the first task will meet the trouble again, and say so."""
        with suppress(OSError):
            self._start()

    def run(
        self,
        task: Task,
        base: Body,
        end: float,
        check: Callable[[], None],
        hear: Callable[[NodeProgress | Written], None],
    ) -> Sealed:
        """The worker's reply. A worker that dies is started again and the task repeated from the state before.

        `end`: when training must be over, on the clock of `time.monotonic`. `check` raises DroppedError as soon as the
        task is not wanted any more. `hear` is told what the worker says meanwhile. Raises TrainingDiedError,
        DroppedError, and whatever the two raise.
        """
        deaths: list[str] = []
        while len(deaths) < MAX_ATTEMPTS:
            try:
                worker = self._ready(check)
                with self._lock:
                    self._is_busy = True
                left_s = max(_LEAST_TRAINING_S, end - time.monotonic())
                worker.give(seal(task.model_copy(update={"deadline_s": left_s}), base))
                return self._await_reply(task, worker, check, hear)
            except TrainingDiedError as error:
                deaths.append(str(error))
                say(f"round {task.round}: {error}")
            finally:
                with self._lock:
                    self._is_busy = False
        raise TrainingDiedError(f"its worker died {len(deaths)} times, at last: {deaths[-1]}")

    def ask_to_hand_in(self) -> None:
        """Ask to stop after the step at hand and to reply with what there is; nothing happens between tasks."""
        with self._lock:
            if self._is_busy and self._worker is not None:
                self._worker.ask_to_hand_in()

    def ask_to_drop(self) -> None:
        """Ask to stop and to forget the task at hand; nothing happens between tasks."""
        with self._lock:
            if self._is_busy and self._worker is not None:
                self._worker.ask_to_drop()

    def close(self) -> None:
        """What goes on is not waited for any more."""
        self._is_closed = True
        self.ask_to_drop()

    def end(self) -> None:
        """End the worker now. What it did not commit is lost."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()

    def _ready(self, check: Callable[[], None]) -> WorkerProcess:
        """The worker, once it has started: only then can it be told to stop, and only then its time begins."""
        check()
        worker = self._worker if self._worker is not None and not self._worker.died_idle else self._start()
        end = time.monotonic() + _WORKER_START_S
        while not worker.is_ready:
            check()
            try:
                sender, signal = self._signals.get(timeout=_POLL_S)
            except Empty:
                if time.monotonic() > end:
                    self.end()
                    raise TrainingDiedError(f"the trainer did not start in {_WORKER_START_S:g} s") from None
                continue
            if sender is worker and isinstance(signal, Ended):
                self._bury(signal)
        return worker

    def _await_reply(
        self,
        task: Task,
        worker: WorkerProcess,
        check: Callable[[], None],
        hear: Callable[[NodeProgress | Written], None],
    ) -> Sealed:
        obey_by = math.inf
        while True:
            obey_by = self._repeat_orders(task, worker, check, obey_by)
            try:
                sender, signal = self._signals.get(timeout=_POLL_S)
            except Empty:
                continue
            if sender is not worker:
                continue  # the last words of one that was ended
            if isinstance(signal, NodeProgress | Written):
                hear(signal)
            elif isinstance(signal, Ended):
                self._bury(signal)
            else:
                if signal.is_last:
                    self.end()
                return without_secrets(signal.message)

    def _repeat_orders(self, task: Task, worker: WorkerProcess, check: Callable[[], None], obey_by: float) -> float:
        """By when a worker must obey; one that had not begun heard nothing. Raises DroppedError then, and closed."""
        with suppress(DroppedError):
            check()
            return math.inf
        if is_late := time.monotonic() > obey_by:  # without another trainer no task would ever begin
            say(f"round {task.round}: the trainer did not stop within {_OBEY_S:g} s, and is ended")
            self.end()
        if is_late or self._is_closed:
            raise DroppedError
        worker.ask_to_drop()
        return min(obey_by, time.monotonic() + _OBEY_S)

    def _bury(self, ended: Ended) -> NoReturn:
        self.end()
        raise TrainingDiedError(f"the trainer died ({ended.reason}); its log is in {self._folder.logs}")

    def _start(self) -> WorkerProcess:
        self.end()
        self._folder.logs.mkdir(parents=True, exist_ok=True)
        command = worker_command(WORKER, self._folder.path, self._plan)
        environment = worker_environment(self._plan, os.environ)
        with (self._folder.logs / "trainer.log").open("ab") as log:
            worker = WorkerProcess(command, environment, log, MAX_HEADER_BYTES * 2, self._signals)
        with self._lock:
            self._worker = worker
        return worker
