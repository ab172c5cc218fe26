"""A node's open task, from the first byte of its base to the last byte of its update, on threads of its own.

The Aggregator asks for a task again and again; the same one changes nothing. The same work under another nonce (the
Aggregator was started anew) is not begun again while it goes on: its reply will carry the new nonce. Work that was done
is handed in again, untrained and uploaded if need be; work that failed is tried again. Other work ends what goes on.
An update is on its way while the trainer still saves its own state.

With a task may come the one that will most likely follow (`photon.aggregator.early`). It begins as soon as the trainer
is free, while the update before is still on its way, and nothing of it leaves this machine before it is asked for. If
other work is asked for instead, it is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Condition, Event, Thread

from photon.errors import WireError
from photon.events import NodeProgress
from photon.fabric.crossing import Crossing, Sending, fetching
from photon.fabric.discretion import public_reason, say
from photon.fabric.home import NodeHome
from photon.fabric.job import Job, Standing, finished
from photon.fabric.process import Written
from photon.fabric.training import DroppedError, Training
from photon.link.body import Body, FileBody, whole_file
from photon.link.client import GatewayClient, LinkError
from photon.link.transfer import download
from photon.link.update import Sealed, decode_message, expect_reply, expect_task
from photon.node.node import failure_reply

_POLL_S = 0.5
_UPLOAD_SLACK_S = 3600.0  # past its deadline an update may still be wanted: the Aggregator says when it is not


class Errands:
    """Does the newest task it was offered. `news` is set when an answer should not wait longer.

    `count` is told of every model byte that crossed, and raises what keeps one from crossing.
    """

    def __init__(
        self,
        run: str,
        training: Training,
        home: NodeHome,
        client: GatewayClient,
        streams: int,
        news: Event,
        count: Callable[[int], None],
    ) -> None:
        self._run, self._training, self._home, self._client, self._streams = run, training, home, client, streams
        self._news, self._count = news, count
        self._changed = Condition()  # of what follows
        self._next: Job | None = None  # asked for, and not begun
        self._current: Job | None = None  # asked for and begun: its standing is told
        self._coming: Job | None = None  # what will most likely be asked next, not begun
        self._early: Job | None = None  # that, begun
        self._vain: Job | None = None  # that, after an error
        self._standing = self._early_standing = Standing()
        self._at_hand: Job | None = None  # what the trainer is for now
        self._fetching: Crossing | None = None  # the base of what is coming
        self._closing = False
        self._sending = Sending(client, streams)
        self._upload: Crossing | None = None  # of the job at hand
        self._thread = Thread(target=self._loop, name="photon-errands", daemon=True)
        self._thread.start()

    def standing(self) -> Standing:
        """How far it is now."""
        with self._changed:
            return self._standing

    def offer(self, head: bytes, base_bytes: int, coming: tuple[bytes, int] | None = None) -> None:
        """The task that is open for this node, with the size of its base; `coming`: the same of what may follow it.

        Raises WireError if one of them is no task for this run.
        """
        job = Job.of(head, base_bytes, self._run)
        follows = Job.of(*coming, self._run) if coming is not None else None
        with self._changed:
            newest = self._next or self._current
            if newest is None or newest.task.nonce != job.task.nonce:
                self._open(job, newest)
            if follows is not None and follows.task.round == job.task.round + 1:
                self._expect(follows)
            self._changed.notify_all()

    def refuse(self, head: bytes, reason: str) -> None:
        """Answer a task with a failure without beginning it. Raises WireError if it is none."""
        task = expect_task(decode_message(Sealed(head, b"")))
        with self._changed:
            if self._standing.nonce == task.nonce:
                return
            self._forget_early()
            self._next, self._current = None, (job := Job(task, head, 0, time.monotonic()))
        self._finish(job, failure_reply(Sealed(head, b""), task.node, reason))

    def drop(self, nonce: str) -> None:
        """The Aggregator no longer waits for this task. What was begun after it may still be what it asks next."""
        with self._changed:
            if self._next is not None and self._next.task.nonce == nonce:
                self._next = None
            if (current := self._current) is not None and current.task.nonce == nonce:
                self._current = self._coming = None
                self._standing = Standing(tokens_per_second=self._standing.tokens_per_second)
                if current.is_same_as(self._at_hand):
                    self._training.ask_to_drop()

    def hand_in(self) -> bool:
        """Stop training after the step at hand and hand in what there is; whether anything is going on.

        What nobody has asked for yet is dropped.
        """
        with self._changed:
            self._forget_early()
            if self._at_hand is not None and self._at_hand.is_same_as(self._current):
                self._training.ask_to_hand_in()
            return self._current is not None or self._next is not None

    def close(self) -> None:
        """End the worker and the threads; what was not committed is lost, and not skipped."""
        with self._changed:
            self._closing = True
            self._training.close()
            self._changed.notify_all()
        self._thread.join(_POLL_S * 4)
        self._training.end()

    # Which work: all of these are called with the lock held.

    def _open(self, job: Job, newest: Job | None) -> None:
        """A task under a nonce that is new: work that goes on, or other work, which ends whatever does."""
        if self._next is None and job.is_same_as(self._early):
            self._adopt(job)
        elif job.is_same_as(newest) and self._standing.phase != "done":
            self._rename(job)
        else:
            self._next = job
            self._forget_early()
            self._training.ask_to_drop()

    def _adopt(self, job: Job) -> None:
        """What was begun early is asked for now."""
        began, self._early = self._early, None
        self._current = replace(job, received=began.received if began else job.received)
        self._standing = replace(
            self._early_standing, nonce=job.task.nonce, tokens_per_second=self._standing.tokens_per_second
        )

    def _rename(self, job: Job) -> None:
        """The work at hand under another nonce."""
        if self._next is not None:
            self._next = replace(job, received=self._next.received)
            return
        self._current = replace(job, received=self._current.received if self._current else job.received)
        self._standing = replace(self._standing, nonce=job.task.nonce)

    def _expect(self, job: Job) -> None:
        """What will most likely be asked next, unless that is known, begun, or was tried in vain."""
        if not any(map(job.is_same_as, (self._coming, self._early, self._vain))):
            self._forget_early()
            self._coming = job

    def _forget_early(self) -> None:
        """Do nothing that is not asked for."""
        was_begun, self._early, self._coming = self._early is not None, None, None
        if was_begun:
            self._training.ask_to_drop()

    def _take(self) -> Job | None:
        """What the trainer is for next."""
        if self._next is not None:
            self._current, self._next = self._next, None
            return self._current
        coming, self._coming = self._coming, None
        # Its time begins now: it was told while another was trained.
        self._early = replace(coming, received=time.monotonic()) if coming is not None else None
        self._early_standing = Standing(phase="waiting")
        return self._early

    def _is_wanted(self, job: Job) -> bool:
        return any(map(job.is_same_as, (self._current, self._early, self._coming)))

    # The thread that does the work.

    def _loop(self) -> None:
        self._training.warm_up()
        while True:
            with self._changed:
                while (job := self._take()) is None and not self._closing:
                    self._changed.wait(_POLL_S)
                if job is None or self._closing:
                    return
                self._at_hand, self._upload = job, None
                if job is self._early:
                    say(f"round {job.task.round}: begun early, while that before is handed in")
            self._run_job(job)
            with self._changed:
                self._at_hand = None

    def _run_job(self, job: Job) -> None:
        """Do it; its update may still be on its way when this returns, and is then waited for beside the next job."""
        try:
            reply = self._do(job)
        except DroppedError:
            self._leave_upload()
            return
        except Exception as error:  # noqa: BLE001  # without this thread the node would seem to work for ever
            self._leave_upload()
            reply = self._failed(job, error)
        if self._upload is None:
            self._finish(job, reply)
            return
        arguments = (job, reply, self._upload)
        try:
            Thread(target=self._deliver, args=arguments, name="photon-delivery", daemon=True).start()
        except RuntimeError:  # no thread can be started
            self._deliver(*arguments)

    def _do(self, job: Job) -> Sealed:
        began = time.monotonic()
        base = self._base(job)
        # When training must end: the way up takes about as long as the way down.
        end = job.received + job.task.deadline_s - 1.5 * (time.monotonic() - began)
        self._show(job, phase="waiting", note="starting the trainer")
        reply = self._training.run(job.task, base, end, lambda: self._check(job), lambda said: self._hear(job, said))
        header = expect_reply(decode_message(Sealed(reply.head, b"")))
        if header.status != "ok":
            self._leave_early(job)
        self._await_asked(job)
        if isinstance(reply.body, FileBody) and len(reply.body):
            self._begin_sending(job, Written(reply.body, header.body_sha256))
        return reply

    def _failed(self, job: Job, error: Exception) -> Sealed:
        """The answer after an error; nothing is begun on top of it."""
        say(f"round {job.task.round}: {type(error).__name__}: {error}")
        with self._changed:
            self._coming = None
            self._leave_early(job)
        return failure_reply(Sealed(job.head, b""), job.task.node, public_reason(type(error).__name__))

    def _leave_early(self, job: Job) -> None:
        """If it was begun early, it is tried again when it is asked for, not before."""
        with self._changed:
            if job.is_same_as(self._early):
                self._early, self._vain = None, job

    def _base(self, job: Job) -> Body:
        """What tells the base, in a file, downloaded unless it is here; those of other rounds are removed."""
        if job.task.form == "held":
            return b""
        sha256 = job.task.body_sha256
        self._show(job, phase="downloading")
        if self._fetching is not None and self._fetching.name == sha256:
            try:
                self._fetching.finish(lambda: self._check(job))
            except (LinkError, OSError) as error:
                say(f"round {job.task.round}: its base did not come in advance: {error}")
            except DroppedError:
                self._check(job)  # else it is the download that was dropped, when nobody wanted it
        wanted = self._home.open_base(sha256)
        download(
            self._client,
            sha256,
            wanted,
            streams=self._streams,
            deadline_s=job.task.deadline_s,
            on_bytes=lambda count: self._crossed(job, count),
        )
        body = whole_file(wanted)
        if len(body) != job.base_bytes:
            raise WireError(f"the base has {len(body)} bytes, the Aggregator announced {job.base_bytes}")
        return body

    def _fetch_coming(self) -> None:
        """Begin to download the base of what is coming, beside that of the task at hand. The lock is held."""
        coming, at_hand = self._coming, self._at_hand
        if coming is None or at_hand is None or coming.task.form == "held":
            return
        sha256, kept = coming.task.body_sha256, at_hand.task.body_sha256
        if self._fetching is not None and self._fetching.name == sha256:
            return  # be it that it failed: whoever needs it tries again

        def target() -> Path:
            return self._home.open_base(sha256, kept)

        deadline_s = coming.task.deadline_s
        self._fetching = fetching(
            self._client, sha256, target, self._streams, deadline_s, lambda count: self._crossed(coming, count)
        )

    def _hear(self, job: Job, said: NodeProgress | Written) -> None:
        if isinstance(said, Written):
            self._begin_sending(job, said)
            return
        phase = said.state if said.state in ("training", "evaluating", "sending") else "waiting"
        self._show(job, phase=phase, step=said.step, steps=said.steps, loss=said.loss)
        with self._changed:
            if phase == "training" and job.is_same_as(self._current):
                self._fetch_coming()

    def _await_asked(self, job: Job) -> None:
        """Wait until work that was begun early is asked for. Raises DroppedError if other work is."""
        with self._changed:
            while job.is_same_as(self._early):
                self._check(job)
                self._changed.wait(_POLL_S)
        self._check(job)

    def _begin_sending(self, job: Job, update: Written) -> None:
        """Send an update, be it that the node has not committed yet; if it is being sent, nothing changes."""
        with self._changed:
            if not job.is_same_as(self._current):
                return  # nobody has asked for it yet
        self._show(job, phase="sending")
        deadline_s = job.task.deadline_s + _UPLOAD_SLACK_S
        self._upload = self._sending.begin(
            update.sha256, update.body, deadline_s, lambda count: self._crossed(job, count)
        )

    def _leave_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.leave()

    def _deliver(self, job: Job, reply: Sealed, upload: Crossing) -> None:
        """Hand a reply in once its update has arrived."""
        try:
            upload.finish(lambda: self._check(job))
        except DroppedError:
            return
        except Exception as error:  # noqa: BLE001  # as above
            reply = self._failed(job, error)
        finally:
            upload.leave()  # between two tasks the Aggregator may remove it
        self._finish(job, reply)

    def _crossed(self, job: Job, count: int) -> None:
        self._count(count)
        self._check(job)

    def _check(self, job: Job) -> None:
        with self._changed:
            if self._closing or self._next is not None or not self._is_wanted(job):
                raise DroppedError

    def _show(
        self,
        job: Job,
        *,
        phase: str,
        step: int = 0,
        steps: int = 0,
        loss: float | None = None,
        note: str = "",
    ) -> None:
        with self._changed:
            shown = Standing(
                phase=phase,
                nonce=self._current.task.nonce if self._current else "",
                round=job.task.round,
                step=step,
                steps=steps,
                loss=loss,
                note=note,
                tokens_per_second=self._standing.tokens_per_second,
            )
            if job.is_same_as(self._current):
                self._standing = shown
            elif job.is_same_as(self._early):
                self._early_standing = shown

    def _finish(self, job: Job, reply: Sealed) -> None:
        with self._changed:
            if self._current is None or not job.is_same_as(self._current):
                return
            self._standing, report = finished(self._standing, job.task, reply, self._current.task.nonce)
        if report is not None:
            say(f"round {job.task.round}: {report.steps} of {job.task.tau} steps, {report.tokens:,} tokens: handed in")
        self._news.set()
