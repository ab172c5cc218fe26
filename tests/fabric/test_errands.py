"""Which offers begin work, which go on with it, and which repeat it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.fabric.gateways import sha256

from photon.errors import WireError
from photon.fabric import errands, sending
from photon.fabric.errands import Errands, Standing
from photon.fabric.home import NodeHome, PreparedRun
from photon.fabric.process import Replied, Signal, WorkerProcess, Written
from photon.link.body import FileBody, whole_file
from photon.link.client import GatewayClient, LinkDownError
from photon.link.update import EMPTY_SHA256, Reply, Sealed, Task, decode_message, expect_reply, expect_task, seal

DEADLINE_S = 10.0


class Desk(Errands):
    """Errands whose work is done by `work` instead of a trainer at the end of a network."""

    def __init__(self, home: Path, work: Callable[[Task], Sealed]) -> None:
        self.begun: list[str] = []
        self.news = Event()
        self._work = work
        prepared = cast(PreparedRun, SimpleNamespace(run="r"))  # nothing else of it is read
        super().__init__(prepared, NodeHome(home), cast(GatewayClient, None), 1, self.news, lambda count: None)

    def _start_worker(self) -> WorkerProcess:
        return cast(WorkerProcess, None)

    def _do(self, job: errands._Job) -> Sealed:
        self.begun.append(job.task.nonce)
        self._show(job, phase="training")
        reply = self._work(job.task)
        self._check(job)
        return reply

    def wait(self, phase: str, nonce: str) -> Standing:
        """How it stands, once it stands so."""
        end = time.monotonic() + DEADLINE_S
        while (standing := self.standing()).phase != phase or standing.nonce != nonce:
            assert time.monotonic() < end, standing
            time.sleep(0.005)
        return standing


@contextmanager
def desk(home: Path, work: Callable[[Task], Sealed], kind: type[Desk] = Desk) -> Iterator[Desk]:
    opened = kind(home, work)
    try:
        yield opened
    finally:
        opened.close()


def task(nonce: str, number: int = 3, run: str = "r") -> Task:
    return Task(
        run=run,
        round=number,
        node="ada",
        nonce=nonce,
        base_sha256="a" * 64,
        evaluate=False,
        sequential_step=4 * number,
        tau=4,
        nodes=2,
        deadline_s=60.0,
    )


def head(of: Task) -> bytes:
    return seal(of, b"").head


def ok(of: Task) -> Sealed:
    return seal(
        Reply(
            run=of.run,
            round=of.round,
            node=of.node,
            nonce=of.nonce,
            base_sha256=of.base_sha256,
            status="ok",
            codec="exact",
            body_sha256=EMPTY_SHA256,
        )
    )


def reply_of(standing: Standing) -> Reply:
    return expect_reply(decode_message(Sealed(standing.head, b"")))


def test_the_same_offer_again_changes_nothing(tmp_path: Path) -> None:
    with desk(tmp_path, ok) as here:
        for _ in range(3):
            here.offer(head(task("n1")), 0)
            assert reply_of(here.wait("done", "n1")).nonce == "n1"
        assert here.begun == ["n1"]
        assert here.news.is_set()


def test_work_that_goes_on_is_not_begun_again_for_another_nonce(tmp_path: Path) -> None:
    release = Event()

    def slow(of: Task) -> Sealed:
        assert release.wait(DEADLINE_S)
        return ok(of)

    with desk(tmp_path, slow) as here:
        here.offer(head(task("n1")), 0)
        here.wait("training", "n1")
        here.offer(head(task("n2")), 0)
        here.wait("training", "n2")
        release.set()
        assert reply_of(here.wait("done", "n2")).nonce == "n2"
        assert here.begun == ["n1"]


DIFFERENCE = {"form": "difference", "held_sha256": "b" * 64, "codec": "int4", "body_sha256": "c" * 64}


def test_work_that_goes_on_is_not_begun_again_though_its_base_is_told_otherwise(tmp_path: Path) -> None:
    release = Event()

    def slow(of: Task) -> Sealed:
        assert release.wait(DEADLINE_S)
        return ok(of)

    with desk(tmp_path, slow) as here:
        here.offer(head(task("n1").model_copy(update=DIFFERENCE)), 0)
        here.wait("training", "n1")
        here.offer(head(task("n2")), 0)
        here.wait("training", "n2")
        release.set()
        assert reply_of(here.wait("done", "n2")).nonce == "n2"
        assert here.begun == ["n1"]


def test_who_lacked_the_base_begins_again_with_the_whole_of_it(tmp_path: Path) -> None:
    def forgetful(of: Task) -> Sealed:
        answer = expect_reply(decode_message(ok(of)))
        lacks = answer.model_copy(update={"status": "lacks", "error": "a new disk"})
        return seal(lacks) if of.form == "difference" else ok(of)

    with desk(tmp_path, forgetful) as here:
        here.offer(head(task("n1").model_copy(update=DIFFERENCE)), 0)
        assert reply_of(here.wait("done", "n1")).status == "lacks"
        here.offer(head(task("n2")), 0)
        assert reply_of(here.wait("done", "n2")).status == "ok"
        assert here.begun == ["n1", "n2"]


def test_for_a_base_that_the_node_has_nothing_is_downloaded(tmp_path: Path) -> None:
    """The desk has no client to ask: another form could not even try."""
    bodies: list[object] = []

    class Downloading(Desk):
        def _do(self, job: errands._Job) -> Sealed:
            bodies.append(self._base(job))
            return ok(job.task)

    with desk(tmp_path, ok, Downloading) as here:
        here.offer(head(task("n1").model_copy(update={"form": "held"})), 0)
        assert reply_of(here.wait("done", "n1")).status == "ok"
        here.offer(head(task("n2")), 0)
        assert reply_of(here.wait("done", "n2")).status == "failed"
    assert bodies == [b""]


def test_a_failure_is_not_repeated_but_tried_again(tmp_path: Path) -> None:
    answers = [LinkDownError("the disk is full"), None]

    def flaky(of: Task) -> Sealed:
        if (trouble := answers.pop(0)) is not None:
            raise trouble
        return ok(of)

    with desk(tmp_path, flaky) as here:
        here.offer(head(task("n1")), 0)
        assert reply_of(here.wait("done", "n1")).status == "failed"
        here.offer(head(task("n2")), 0)
        assert reply_of(here.wait("done", "n2")).status == "ok"
        assert here.begun == ["n1", "n2"]


def test_finished_work_is_handed_in_again_and_not_merely_renamed(tmp_path: Path) -> None:
    """What was uploaded may be gone: an Aggregator that was stopped in good order has removed it."""
    with desk(tmp_path, ok) as here:
        here.offer(head(task("n1")), 0)
        here.wait("done", "n1")
        here.offer(head(task("n2")), 0)
        here.wait("done", "n2")
        assert here.begun == ["n1", "n2"]


def test_other_work_takes_the_place_of_what_goes_on(tmp_path: Path) -> None:
    release = Event()

    def slow_first(of: Task) -> Sealed:
        assert of.nonce == "n2" or release.wait(DEADLINE_S)
        return ok(of)

    with desk(tmp_path, slow_first) as here:
        here.offer(head(task("n1")), 0)
        here.wait("training", "n1")
        here.offer(head(task("n2", number=4)), 0)
        release.set()
        assert reply_of(here.wait("done", "n2")).round == 4
        assert here.begun == ["n1", "n2"]


def test_dropped_work_leaves_nothing_to_hand_in(tmp_path: Path) -> None:
    release = Event()

    def slow(of: Task) -> Sealed:
        assert release.wait(DEADLINE_S)
        return ok(of)

    with desk(tmp_path, slow) as here:
        here.offer(head(task("n1")), 0)
        here.wait("training", "n1")
        here.drop("another")
        assert here.hand_in()
        here.drop("n1")
        assert here.standing() == Standing()
        assert not here.hand_in()
        release.set()
        here.offer(head(task("n2")), 0)
        here.wait("done", "n2")


class Hanging:
    """A trainer that takes tasks and does nothing, whatever it is told."""

    is_ready, died_idle = True, False

    def __init__(self) -> None:
        self.given: list[str] = []
        self.is_killed = False

    def give(self, message: Sealed) -> None:
        self.given.append(expect_task(decode_message(message)).nonce)

    def ask_to_drop(self) -> None:
        pass

    def kill(self) -> None:
        self.is_killed = True

    def wait(self) -> None:
        pass


class HangingDesk(Desk):
    """Errands with trainers that hang."""

    def _start_worker(self) -> WorkerProcess:
        self.workers = [*getattr(self, "workers", []), Hanging()]
        self._worker = cast(WorkerProcess, self.workers[-1])
        return self._worker

    def _do(self, job: errands._Job) -> Sealed:
        return self._train(job, b"", time.monotonic() + DEADLINE_S)


def test_a_trainer_that_hangs_is_ended_when_its_work_is_not_wanted_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the node would take part in no round any more, for as long as it runs."""
    monkeypatch.setattr(errands, "_OBEY_S", 0.05)
    monkeypatch.setattr(errands, "_POLL_S", 0.01)
    with desk(tmp_path, ok, HangingDesk) as here:
        assert isinstance(here, HangingDesk)
        here.offer(head(task("n1")), 0)
        until(lambda: here.workers[0].given == ["n1"])
        here.drop("n1")
        until(lambda: here.workers[0].is_killed)
        here.offer(head(task("n2", number=4)), 0)
        until(lambda: len(here.workers) == 2 and here.workers[1].given == ["n2"])


class Saving:
    """A trainer that saves its own state for as long as its update has not arrived; `update` is where that lies."""

    is_ready, died_idle = True, False

    def __init__(self, put: Callable[[Signal], None], updates: list[Path], arrived: Event) -> None:
        self._put, self._updates, self._arrived = put, updates, arrived

    def give(self, message: Sealed) -> None:
        Thread(target=self._answer, args=(expect_task(decode_message(message)),), daemon=True).start()

    def _answer(self, of: Task) -> None:
        body = whole_file(self._updates[-1])
        for update in self._updates:
            self._put(Written(whole_file(update), sha256(update.read_bytes())))
        if self._arrived.wait(DEADLINE_S):
            answer = expect_reply(decode_message(ok(of)))
            named = answer.model_copy(update={"body_sha256": sha256(self._updates[-1].read_bytes())})
            self._put(Replied(Sealed(seal(named).head, body), is_last=False))

    def ask_to_drop(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def wait(self) -> None:
        pass


class SavingDesk(Desk):
    """Errands with a trainer that saves, and a network on which everything arrives."""

    updates: list[Path]

    def _start_worker(self) -> WorkerProcess:
        self.arrived = Event()
        worker = cast(
            WorkerProcess, Saving(lambda signal: self._signals.put((worker, signal)), self.updates, self.arrived)
        )
        self._worker = worker
        return worker

    def _do(self, job: errands._Job) -> Sealed:
        return Errands._do(self, job)

    def _base(self, job: errands._Job) -> bytes:
        return b""


@pytest.mark.parametrize("written", [["one"], ["other", "one"]], ids=["once", "and other bytes before"])
def test_an_update_travels_while_the_node_saves_its_own_state(
    written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This trainer would save for ever if its update were sent after it."""
    sent: list[str] = []
    places: list[SavingDesk] = []

    def upload(client: object, name: str, body: FileBody, *, streams: int, deadline_s: float, on_bytes: Any) -> None:
        on_bytes(len(body))
        assert sha256(body.path.read_bytes()) == name
        assert places[0].wait("sending", "n1").head == b""  # nothing counts yet
        sent.append(body.path.name)
        if body.path.name == "one":
            places[0].arrived.set()

    monkeypatch.setattr(sending, "upload", upload)
    SavingDesk.updates = [tmp_path / name for name in written]
    for update in SavingDesk.updates:
        update.write_text(update.name)
    with desk(tmp_path / "home", ok, SavingDesk) as here:
        assert isinstance(here, SavingDesk)
        places.append(here)
        here.offer(head(task("n1")), 0)
        done = here.wait("done", "n1")
    assert reply_of(done).body_sha256 == sha256(b"one")
    assert done.body_bytes == 3
    assert sent[-1] == "one"
    assert sent.count("one") == 1


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_reason_that_names_the_owners_paths_stays_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(of: Task) -> Sealed:
        raise OSError(28, "no space", "/home/ada/diary")

    with desk(tmp_path, failing) as here:
        here.offer(head(task("n1")), 0)
        reply = reply_of(here.wait("done", "n1"))
    assert reply.error == "OSError; the node's own log says more"
    assert "/home/ada/diary" in capsys.readouterr().out


def test_a_mistake_of_ours_fails_its_task_and_not_the_node(tmp_path: Path) -> None:
    """An error that nobody foresaw must not leave a node that says "training" for ever."""

    def work(of: Task) -> Sealed:
        if of.nonce == "n1":
            raise ZeroDivisionError("/home/ada/letters")
        return ok(of)

    with desk(tmp_path, work) as here:
        here.offer(head(task("n1")), 0)
        reply = reply_of(here.wait("done", "n1"))
        assert reply.status == "failed"
        assert "letters" not in reply.error
        here.offer(head(task("n2", 4)), 0)
        assert reply_of(here.wait("done", "n2")).status == "ok"


def test_a_task_is_refused_without_being_begun(tmp_path: Path) -> None:
    with desk(tmp_path, ok) as here:
        here.refuse(head(task("n1")), "CapReachedError: outside its hours")
        assert reply_of(here.wait("done", "n1")).error == "CapReachedError: outside its hours"
        here.offer(head(task("n1")), 0)  # that nonce has had its answer
        assert here.begun == []
        here.offer(head(task("n2")), 0)
        assert reply_of(here.wait("done", "n2")).status == "ok"


def test_a_task_of_another_run_is_no_task(tmp_path: Path) -> None:
    with desk(tmp_path, ok) as here, pytest.raises(WireError, match="of run other"):
        here.offer(head(task("n1", run="other")), 0)
