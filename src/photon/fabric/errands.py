"""A node's open task, from the first byte of its base to the last byte of its update, on a thread of its own.

The Aggregator asks for a task again and again; the same one changes nothing. The same work under another nonce (the
Aggregator was started anew) is not begun again while it goes on: its reply will carry the new nonce. Work that was done
is handed in again, untrained and uploaded if need be; work that failed is tried again. Other work ends what goes on.
The trainer is a worker process that stays: model, compiled graph and optimizer are warm when the next task comes. Its
update is on its way while it still saves its own state.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Condition, Event, Thread
from typing import NoReturn

from photon.errors import WireError
from photon.events import NodeProgress
from photon.fabric.discretion import public_reason, say, without_secrets
from photon.fabric.home import NodeHome, PreparedRun
from photon.fabric.local import WORKER, worker_command
from photon.fabric.process import Ended, Signal, TrainingDiedError, WorkerProcess, Written
from photon.fabric.sending import Sending
from photon.link.body import Body, FileBody, whole_file
from photon.link.client import GatewayClient
from photon.link.transfer import download
from photon.link.update import (
    MAX_HEADER_BYTES,
    Reply,
    Sealed,
    Task,
    decode_message,
    expect_reply,
    expect_task,
    seal,
)
from photon.node.device import worker_environment
from photon.node.node import failure_reply

MAX_ATTEMPTS = 3  # of one task, when its worker dies
_WORKER_START_S = 600.0
_OBEY_S = 600.0  # a trainer obeys after the step or the score at hand, be it the one that compiles the model
_POLL_S = 0.5
_UPLOAD_SLACK_S = 3600.0  # past its deadline an update may still be wanted: the Aggregator says when it is not
_LEAST_TRAINING_S = 1.0


@dataclass(frozen=True)
class Standing:
    """How far the open task is, as the next answer says it."""

    phase: str = "idle"
    nonce: str = ""
    round: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    note: str = ""
    head: bytes = b""  # of the finished reply
    body_bytes: int = 0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class _Job:
    task: Task
    head: bytes
    base_bytes: int
    received: float


class _DroppedError(Exception):
    """The task at hand is not wanted any more."""


class Errands:
    """Does the newest task it was offered. `news` is set when an answer should not wait longer.

    `count` is told of every model byte that crossed, and raises what keeps one from crossing.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        home: NodeHome,
        client: GatewayClient,
        streams: int,
        news: Event,
        count: Callable[[int], None],
    ) -> None:
        self._prepared, self._home, self._client, self._streams = prepared, home, client, streams
        self._news, self._count = news, count
        self._changed = Condition()
        self._next: _Job | None = None
        self._current: _Job | None = None
        self._standing = Standing()
        self._signals: SimpleQueue[tuple[WorkerProcess, Signal]] = SimpleQueue()
        self._worker: WorkerProcess | None = None
        self._is_training = False
        self._closing, self._sending = False, Sending(client, streams)
        self._thread = Thread(target=self._loop, name="photon-errands", daemon=True)
        self._thread.start()

    def standing(self) -> Standing:
        """How far it is now."""
        with self._changed:
            return self._standing

    def offer(self, head: bytes, base_bytes: int) -> None:
        """The task that is open for this node. Raises WireError if it is none for this run."""
        task = expect_task(decode_message(Sealed(head, b"")))
        if task.run != self._prepared.run:
            raise WireError(f"a task of run {task.run}, this node is prepared for {self._prepared.run}")
        with self._changed:
            newest = self._next or self._current
            if newest is not None and newest.task.nonce == task.nonce:
                return
            job = _Job(task, head, base_bytes, time.monotonic())
            if newest is not None and newest.task.is_same_work(task) and self._standing.phase != "done":
                self._rename(job)
                return
            self._next = job
            self._interrupt()
            self._changed.notify_all()

    def refuse(self, head: bytes, reason: str) -> None:
        """Answer a task with a failure without beginning it. Raises WireError if it is none."""
        task = expect_task(decode_message(Sealed(head, b"")))
        with self._changed:
            if self._standing.nonce == task.nonce:
                return
            self._current = job = _Job(task, head, 0, time.monotonic())
        self._finish(job, failure_reply(Sealed(head, b""), task.node, reason))

    def drop(self, nonce: str) -> None:
        """The Aggregator no longer waits for this task."""
        with self._changed:
            if self._next is not None and self._next.task.nonce == nonce:
                self._next = None
            if self._current is not None and self._current.task.nonce == nonce:
                self._current = None
                self._standing = Standing(tokens_per_second=self._standing.tokens_per_second)
                self._interrupt()

    def hand_in(self) -> bool:
        """Stop training after the step at hand and hand in what there is; whether anything is going on."""
        with self._changed:
            if self._is_training and self._worker is not None:
                self._worker.ask_to_hand_in()
            return self._current is not None or self._next is not None

    def close(self) -> None:
        """End the worker and the thread; what was not committed is lost, and not skipped."""
        with self._changed:
            self._closing = True
            self._interrupt()
            self._changed.notify_all()
        self._thread.join(_POLL_S * 4)
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()

    def _rename(self, job: _Job) -> None:
        """The work at hand under another nonce."""
        if self._next is not None:
            self._next = replace(job, received=self._next.received)
            return
        self._current = replace(job, received=self._current.received if self._current else job.received)
        self._standing = replace(self._standing, nonce=job.task.nonce)

    def _interrupt(self) -> None:
        if self._is_training and self._worker is not None:
            self._worker.ask_to_drop()

    def _loop(self) -> None:
        with suppress(OSError):  # the task at hand will meet it again, and say so
            self._start_worker()
        while True:
            with self._changed:
                while (job := self._next) is None and not self._closing:
                    self._changed.wait(_POLL_S)
                if job is None or self._closing:
                    return
                self._current, self._next = job, None
            self._run(job)

    def _run(self, job: _Job) -> None:
        try:
            reply = self._do(job)
        except _DroppedError:
            return
        except Exception as error:  # noqa: BLE001  # without this thread the node would seem to work for ever
            say(f"round {job.task.round}: {type(error).__name__}: {error}")
            reply = failure_reply(Sealed(job.head, b""), job.task.node, public_reason(type(error).__name__))
        self._finish(job, reply)

    def _do(self, job: _Job) -> Sealed:
        began = time.monotonic()
        base = self._base(job)
        # When training must end: the way up takes about as long as the way down.
        end = job.received + job.task.deadline_s - 1.5 * (time.monotonic() - began)
        try:
            reply = self._train(job, base, end)
            self._check(job)
            if isinstance(reply.body, FileBody) and len(reply.body):
                header = expect_reply(decode_message(Sealed(reply.head, b"")))
                self._begin_sending(job, Written(reply.body, header.body_sha256))
                self._sending.finish(lambda: self._check(job))
            return reply
        finally:
            self._sending.leave()

    def _begin_sending(self, job: _Job, update: Written) -> None:
        """Send an update, be it that the node has not committed yet; if it is being sent, nothing changes."""
        self._show(job, phase="sending")
        deadline_s = job.task.deadline_s + _UPLOAD_SLACK_S
        self._sending.begin(update.sha256, update.body, deadline_s, lambda count: self._crossed(job, count))

    def _base(self, job: _Job) -> Body:
        """What tells the base, in a file, downloaded unless it is here; those of other rounds are removed."""
        if job.task.form == "held":
            return b""
        self._show(job, phase="downloading")
        wanted = self._home.open_base(job.task.body_sha256)
        download(
            self._client,
            job.task.body_sha256,
            wanted,
            streams=self._streams,
            deadline_s=job.task.deadline_s,
            on_bytes=lambda count: self._crossed(job, count),
        )
        body = whole_file(wanted)
        if len(body) != job.base_bytes:
            raise WireError(f"the base has {len(body)} bytes, the Aggregator announced {job.base_bytes}")
        return body

    def _crossed(self, job: _Job, count: int) -> None:
        self._count(count)
        self._check(job)

    def _check(self, job: _Job) -> None:
        with self._changed:
            if self._closing or self._next is not None or not self._is_current(job):
                raise _DroppedError

    def _is_current(self, job: _Job) -> bool:
        return self._current is not None and self._current.task.is_same_work(job.task)

    def _train(self, job: _Job, base: Body, end: float) -> Sealed:
        """The worker's reply. A worker that dies is started again and the task repeated from the state before."""
        self._show(job, phase="waiting", note="starting the trainer")
        deaths: list[str] = []
        while len(deaths) < MAX_ATTEMPTS:
            try:
                worker = self._ready_worker(job)
                with self._changed:
                    self._is_training = True
                left_s = max(_LEAST_TRAINING_S, end - time.monotonic())
                worker.give(seal(job.task.model_copy(update={"deadline_s": left_s}), base))
                return self._await_reply(job, worker)
            except TrainingDiedError as error:
                deaths.append(str(error))
                say(f"round {job.task.round}: {error}")
            finally:
                with self._changed:
                    self._is_training = False
        raise TrainingDiedError(f"its worker died {len(deaths)} times, at last: {deaths[-1]}")

    def _ready_worker(self, job: _Job) -> WorkerProcess:
        """The worker, once it has started: only then can it be told to stop, and only then its time begins."""
        self._check(job)
        worker = self._worker if self._worker is not None and not self._worker.died_idle else self._start_worker()
        end = time.monotonic() + _WORKER_START_S
        while not worker.is_ready:
            self._check(job)
            try:
                sender, signal = self._signals.get(timeout=_POLL_S)
            except Empty:
                if time.monotonic() > end:
                    self._end_worker()
                    raise TrainingDiedError(f"the trainer did not start in {_WORKER_START_S:g} s") from None
                continue
            if sender is worker and isinstance(signal, Ended):
                self._bury(signal)
        return worker

    def _await_reply(self, job: _Job, worker: WorkerProcess) -> Sealed:
        obey_by = math.inf
        while True:
            obey_by = self._repeat_orders(job, worker, obey_by)
            try:
                sender, signal = self._signals.get(timeout=_POLL_S)
            except Empty:
                continue
            if sender is not worker:
                continue  # the last words of one that was ended
            if isinstance(signal, NodeProgress):
                self._progress(job, signal)
            elif isinstance(signal, Written):
                self._begin_sending(job, signal)
            elif isinstance(signal, Ended):
                self._bury(signal)
            else:
                if signal.is_last:
                    self._end_worker()
                return without_secrets(signal.message)

    def _bury(self, ended: Ended) -> NoReturn:
        self._end_worker()
        raise TrainingDiedError(f"the trainer died ({ended.reason}); its log is in {self._prepared.folder.logs}")

    def _repeat_orders(self, job: _Job, worker: WorkerProcess, obey_by: float) -> float:
        """By when a worker must obey; one that had not begun heard nothing. Raises _DroppedError then, and closing."""
        with suppress(_DroppedError):
            self._check(job)
            return math.inf
        if is_late := time.monotonic() > obey_by:  # without another trainer no task would ever begin
            say(f"round {job.task.round}: the trainer did not stop within {_OBEY_S:g} s, and is ended")
            self._end_worker()
        if is_late or self._closing:
            raise _DroppedError
        worker.ask_to_drop()
        return min(obey_by, time.monotonic() + _OBEY_S)

    def _progress(self, job: _Job, progress: NodeProgress) -> None:
        phase = progress.state if progress.state in ("training", "evaluating", "sending") else "waiting"
        self._show(job, phase=phase, step=progress.step, steps=progress.steps, loss=progress.loss)

    def _show(
        self,
        job: _Job,
        *,
        phase: str,
        step: int = 0,
        steps: int = 0,
        loss: float | None = None,
        note: str = "",
    ) -> None:
        with self._changed:
            if self._current is None or not self._is_current(job):
                return
            self._standing = Standing(
                phase=phase,
                nonce=self._current.task.nonce,
                round=job.task.round,
                step=step,
                steps=steps,
                loss=loss,
                note=note,
                tokens_per_second=self._standing.tokens_per_second,
            )

    def _finish(self, job: _Job, reply: Sealed) -> None:
        with self._changed:
            if self._current is None or not self._current.task.is_same_work(job.task):
                return
            header = expect_reply(decode_message(Sealed(reply.head, b"")))
            header = header.model_copy(update={"nonce": self._current.task.nonce})
            self._standing = Standing(
                phase="done",
                nonce=header.nonce,
                round=job.task.round,
                step=header.training.steps if header.training else 0,
                steps=job.task.tau,
                head=seal(header).head,
                body_bytes=len(reply.body),
                tokens_per_second=_speed(header) or self._standing.tokens_per_second,
            )
        if (done := header.training) is not None:
            say(f"round {job.task.round}: {done.steps} of {job.task.tau} steps, {done.tokens:,} tokens: handed in")
        self._news.set()

    def _start_worker(self) -> WorkerProcess:
        self._end_worker()
        folder, plan = self._prepared.folder, self._prepared.plan
        folder.logs.mkdir(parents=True, exist_ok=True)
        command, environment = worker_command(WORKER, folder.path, plan), worker_environment(plan, os.environ)
        with (folder.logs / "trainer.log").open("ab") as log:
            worker = WorkerProcess(command, environment, log, MAX_HEADER_BYTES * 2, self._signals)
        with self._changed:
            self._worker = worker
        return worker

    def _end_worker(self) -> None:
        with self._changed:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()


def _speed(reply: Reply) -> float:
    return reply.training.tokens / max(reply.training.seconds, 1e-9) if reply.training else 0.0
