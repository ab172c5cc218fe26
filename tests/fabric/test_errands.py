"""Which offers begin work, which go on with it, and which repeat it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import pytest
from tests.fabric.gateways import sha256, some_bytes

from photon.errors import WireError
from photon.events import NodeProgress
from photon.fabric import crossing, errands, training
from photon.fabric.errands import Errands
from photon.fabric.home import NodeHome
from photon.fabric.job import Job, Standing
from photon.fabric.process import Replied, Signal, WorkerProcess, Written
from photon.fabric.training import Training
from photon.link.body import FileBody, whole_file
from photon.link.client import GatewayClient, LinkDownError
from photon.link.update import EMPTY_SHA256, Reply, Sealed, Task, decode_message, expect_reply, expect_task, seal
from photon.node.device import WorkerPlan
from photon.node.node import failure_reply
from photon.runfolder import RunFolder

DEADLINE_S = 10.0


class Trainer(Training):
    """A trainer whose workers are what `worker` makes of the queue that they speak on; at first there is none."""

    def __init__(self, worker: Callable[[Callable[[Signal], None]], Any] = lambda put: None) -> None:
        super().__init__(RunFolder(Path("/nowhere")), WorkerPlan("cpu", 1))
        self._make = worker

    def _start(self) -> WorkerProcess:
        self.end()
        worker = self._make(lambda signal: self._signals.put((worker, signal)))
        self._worker = worker
        return cast(WorkerProcess, worker)


class Desk(Errands):
    """Errands whose work is done by `work` instead of a trainer at the end of a network."""

    def __init__(self, home: Path, work: Callable[[Task], Sealed], training: Training | None = None) -> None:
        self.begun: list[str] = []
        self.news = Event()
        self._work = work
        client = cast(GatewayClient, None)
        super().__init__("r", training or Trainer(), NodeHome(home), client, 1, self.news, lambda count: None)

    def _do(self, job: Job) -> Sealed:
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
def desk(
    home: Path, work: Callable[[Task], Sealed], kind: type[Desk] = Desk, training: Training | None = None
) -> Iterator[Desk]:
    opened = kind(home, work, training)
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
        def _do(self, job: Job) -> Sealed:
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


class Working(Desk):
    """Errands with a trainer, for tasks whose base is here."""

    def _do(self, job: Job) -> Sealed:
        self.begun.append(job.task.nonce)
        return Errands._do(self, job)

    def _base(self, job: Job) -> bytes:
        return b""


def test_a_trainer_that_hangs_is_ended_when_its_work_is_not_wanted_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the node would take part in no round any more, for as long as it runs."""
    monkeypatch.setattr(training, "_OBEY_S", 0.05)
    monkeypatch.setattr(training, "_POLL_S", 0.01)
    workers: list[Hanging] = []

    def hanging(put: Callable[[Signal], None]) -> Hanging:
        workers.append(Hanging())
        return workers[-1]

    with desk(tmp_path, ok, Working, Trainer(hanging)) as here:
        here.offer(head(task("n1")), 0)
        until(lambda: workers[0].given == ["n1"])
        here.drop("n1")
        until(lambda: workers[0].is_killed)
        here.offer(head(task("n2", number=4)), 0)
        until(lambda: len(workers) == 2 and workers[1].given == ["n2"])


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


@pytest.mark.parametrize("written", [["one"], ["other", "one"]], ids=["once", "and other bytes before"])
def test_an_update_travels_while_the_node_saves_its_own_state(
    written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This trainer would save for ever if its update were sent after it."""
    sent: list[str] = []
    arrived = Event()

    def upload(client: object, name: str, body: FileBody, *, streams: int, deadline_s: float, on_bytes: Any) -> None:
        on_bytes(len(body))
        assert sha256(body.path.read_bytes()) == name
        assert here.wait("sending", "n1").head == b""  # nothing counts yet
        sent.append(body.path.name)
        if body.path.name == "one":
            arrived.set()

    monkeypatch.setattr(crossing, "upload", upload)
    updates = [tmp_path / name for name in written]
    for update in updates:
        update.write_text(update.name)
    saving = Trainer(lambda put: Saving(put, updates, arrived))
    with desk(tmp_path / "home", ok, Working, saving) as here:
        here.offer(head(task("n1")), 0)
        done = here.wait("done", "n1")
    assert reply_of(done).body_sha256 == sha256(b"one")
    assert done.body_bytes == 3
    assert sent[-1] == "one"
    assert sent.count("one") == 1


# --- what is begun before it is asked for ----------------------------------------------------------------------------


class Worker:
    """A trainer that ends a task when it is let, with an update of its own; `heard` is what it was told to do."""

    is_ready, died_idle = True, False

    def __init__(self, put: Callable[[Signal], None], folder: Path) -> None:
        self._put, self._folder = put, folder
        self.given: list[int] = []
        self.time_s: list[float] = []
        self.heard: list[str] = []
        self.saved: list[int] = []
        self.may_end = {number: Event() for number in range(10)}

    def give(self, message: Sealed) -> None:
        of = expect_task(decode_message(message))
        self.given.append(of.round)
        self.time_s.append(of.deadline_s)
        self._put(NodeProgress(node="ada", round=of.round, state="training", step=1, steps=of.tau))
        Thread(target=self._answer, args=(of, len(self.heard)), daemon=True).start()

    def _answer(self, of: Task, orders_before: int) -> None:
        end = time.monotonic() + DEADLINE_S
        while not self.may_end[of.round].wait(0.005):
            assert time.monotonic() < end
            if "drop" in self.heard[orders_before:]:
                self._put(Replied(failure_reply(seal(of), "ada", "dropped"), is_last=False))
                return
        update = self._folder / f"update-{of.round}"
        update.write_bytes(some_bytes(100 + of.round, of.round))
        digest = sha256(update.read_bytes())
        self._put(Written(whole_file(update), digest))
        answer = expect_reply(decode_message(ok(of))).model_copy(update={"body_sha256": digest})
        self.saved.append(of.round)
        self._put(Replied(Sealed(seal(answer).head, whole_file(update)), is_last=False))

    def ask_to_drop(self) -> None:
        self.heard.append("drop")

    def ask_to_hand_in(self) -> None:
        self.heard.append("hand in")

    def kill(self) -> None:
        pass

    def wait(self) -> None:
        pass


class Net:
    """The network of one node: what was sent and fetched, and whether it lets anything through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[str] = []
        self.fetched: list[str] = []
        self.is_open = Event()
        monkeypatch.setattr(crossing, "upload", self.upload)
        monkeypatch.setattr(crossing, "download", self.download)

    def upload(
        self, client: object, name: str, body: FileBody, *, streams: int, deadline_s: float, on_bytes: Any
    ) -> None:
        while not self.is_open.wait(0.005):
            on_bytes(0)
        on_bytes(len(body))
        self.sent.append(body.path.name)

    def download(self, client: object, name: str, target: Path, **options: Any) -> None:
        options["on_bytes"](1)
        self.fetched.append(name)


class Site(Working):
    """Errands with a trainer and a network that tests hold in their hands."""

    worker: Worker

    def go(self, number: int) -> None:
        """Let the trainer end a round."""
        self.worker.may_end[number].set()


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    return Net(monkeypatch)


@pytest.fixture
def site(net: Net, tmp_path: Path) -> Iterator[Site]:
    worker: list[Worker] = []

    def made(put: Callable[[Signal], None]) -> Worker:
        worker.append(Worker(put, tmp_path))
        return worker[-1]

    with desk(tmp_path / "home", ok, Site, Trainer(made)) as here:
        assert isinstance(here, Site)
        until(lambda: bool(worker))
        here.worker = worker[0]
        yield here


def coming(nonce: str, number: int) -> tuple[bytes, int]:
    return head(task(nonce, number).model_copy(update={"body_sha256": str(number) * 64})), 0


def test_the_next_round_is_trained_while_an_update_is_on_its_way(site: Site, net: Net) -> None:
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    until(lambda: site.worker.given == [3, 4])
    assert site.wait("sending", "n3").round == 3  # of what was not asked for nothing is told
    assert net.sent == []
    net.is_open.set()
    assert reply_of(site.wait("done", "n3")).round == 3
    assert net.sent == ["update-3"]
    # Round 4 is asked for: it stands where it is, and its reply answers the nonce that asks.
    site.offer(head(task("n4", 4)), 0)
    assert site.wait("training", "n4").step == 1
    site.go(4)
    assert reply_of(site.wait("done", "n4")).round == 4
    assert site.worker.given == [3, 4]
    assert site.begun == ["n3", "early"]
    assert net.sent == ["update-3", "update-4"]


def test_nothing_of_early_work_leaves_before_it_is_asked_for(site: Site, net: Net) -> None:
    net.is_open.set()
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    site.go(4)
    until(lambda: site.worker.saved == [3, 4])
    site.wait("done", "n3")
    time.sleep(0.1)
    assert net.sent == ["update-3"]
    assert site.standing().nonce == "n3"
    site.offer(head(task("n4", 4)), 0)
    assert reply_of(site.wait("done", "n4")).round == 4
    assert net.sent == ["update-3", "update-4"]
    assert site.worker.given == [3, 4]


def test_early_work_has_the_time_of_any_other(site: Site, net: Net) -> None:
    """Told a minute before it can begin, it would else end a minute before its deadline."""
    net.is_open.set()
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    until(lambda: site.worker.given == [3])
    time.sleep(0.5)
    site.go(3)
    until(lambda: site.worker.given == [3, 4])
    assert site.worker.time_s[1] > 59.8


def test_its_base_comes_while_the_round_before_is_trained(site: Site, net: Net) -> None:
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    until(lambda: net.fetched == ["4" * 64])
    assert site.worker.given == [3]


def test_a_base_whose_download_was_dropped_once_is_fetched_when_it_is_needed(
    site: Site, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Aggregator was started anew while it came: what ended the download then does not end the next round now."""
    arrives = Event()

    def stuck(client: object, name: str, target: Path, **options: Any) -> None:
        while not arrives.wait(0.005):
            options["on_bytes"](0)

    monkeypatch.setattr(crossing, "download", stuck)
    monkeypatch.setattr(errands, "download", lambda client, name, target, **options: target.touch())
    monkeypatch.setattr(Site, "_base", Errands._base)
    net.is_open.set()
    site.go(3)
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.wait("done", "n3")
    until(lambda: site._early is not None)  # waits for its base, which is on its way
    site.offer(head(task("again", 3)), 0, coming("early again", 4))
    site.wait("done", "again")
    site.offer(*coming("n4", 4))
    site.go(4)
    assert reply_of(site.wait("done", "n4")).round == 4


@pytest.mark.parametrize("when", ["training", "done"])
def test_other_work_than_was_foreseen_takes_its_place(site: Site, net: Net, when: str) -> None:
    net.is_open.set()
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    if when == "done":
        site.go(4)
        until(lambda: site.worker.saved == [3, 4])
    until(lambda: site.worker.given == [3, 4])
    site.wait("done", "n3")
    other = task("n4", 4).model_copy(update={"base_sha256": "d" * 64})
    site.go(4) if when == "done" else None
    site.offer(head(other), 0)
    if when == "training":
        until(lambda: "drop" in site.worker.heard)
        site.go(4)
    assert reply_of(site.wait("done", "n4")).base_sha256 == "d" * 64
    assert site.worker.given == [3, 4, 4]
    assert site.begun == ["n3", "early", "n4"]


def test_a_round_that_is_asked_for_again_comes_before_the_next(site: Site, net: Net) -> None:
    """The Aggregator was started anew: it has lost what was handed in, and asks for it under another nonce."""
    net.is_open.set()
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    until(lambda: site.worker.given == [3, 4])
    site.wait("done", "n3")
    site.offer(head(task("again", 3)), 0, coming("early again", 4))
    until(lambda: "drop" in site.worker.heard)
    assert reply_of(site.wait("done", "again")).round == 3
    until(lambda: site.worker.given == [3, 4, 3, 4])
    site.go(4)
    site.offer(head(task("n4", 4)), 0)
    assert reply_of(site.wait("done", "n4")).round == 4


def test_while_it_is_on_its_way_a_reply_takes_another_nonce_and_the_next_round_goes_on(site: Site, net: Net) -> None:
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    until(lambda: site.worker.given == [3, 4])
    site.wait("sending", "n3")
    site.offer(head(task("again", 3)), 0, coming("early again", 4))
    net.is_open.set()
    assert reply_of(site.wait("done", "again")).nonce == "again"
    assert site.worker.heard == []
    assert site.worker.given == [3, 4]


def test_a_task_that_is_given_up_does_not_end_what_was_begun_after_it(site: Site, net: Net) -> None:
    """It came too late for its round. The next has the base that was foreseen all the same."""
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    until(lambda: site.worker.given == [3, 4])
    site.drop("n3")
    assert site.standing().phase == "idle"
    site.offer(head(task("n4", 4)), 0)
    site.go(4)
    net.is_open.set()
    assert reply_of(site.wait("done", "n4")).round == 4
    assert site.worker.heard == []
    assert net.sent == ["update-4"]  # of round 3 nothing moves any more


def test_a_task_that_is_dropped_before_it_is_trained_leaves_nothing_to_begin(site: Site) -> None:
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    until(lambda: site.worker.given == [3])
    site.drop("n3")
    until(lambda: site.worker.heard == ["drop"])
    time.sleep(0.1)
    assert site.worker.given == [3]
    assert not site.hand_in()


def test_who_leaves_hands_in_what_was_asked_for_and_drops_what_was_not(site: Site, net: Net) -> None:
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    until(lambda: site.worker.given == [3])
    assert site.hand_in()
    assert site.worker.heard == ["hand in"]
    site.go(3)
    net.is_open.set()
    site.wait("done", "n3")
    time.sleep(0.1)
    assert site.worker.given == [3]  # and nothing else is begun
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    until(lambda: site.worker.given == [3, 4])
    site.hand_in()
    until(lambda: site.worker.heard == ["hand in", "drop"])
    site.hand_in()
    assert site.worker.heard == ["hand in", "drop"]


def test_a_refusal_ends_what_was_begun_early(site: Site, net: Net) -> None:
    net.is_open.set()
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    until(lambda: site.worker.given == [3, 4])
    site.wait("done", "n3")
    site.refuse(head(task("n4", 4)), "CapReachedError: outside its hours")
    assert reply_of(site.wait("done", "n4")).error == "CapReachedError: outside its hours"
    until(lambda: site.worker.heard == ["drop"])
    assert net.sent == ["update-3"]


def test_early_work_that_fails_is_tried_again_when_it_is_asked_for(
    site: Site, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.is_open.set()
    troubles, tried = [OSError("no space")], list[int]()
    base = Site._base

    def full(self: Site, job: Job) -> bytes:
        tried.append(job.task.round)
        if job.task.round == 4 and troubles:
            raise troubles.pop()
        return base(self, job)

    monkeypatch.setattr(Site, "_base", full)
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    assert reply_of(site.wait("done", "n3")).status == "ok"
    until(lambda: not troubles and site._early is None)
    for _ in range(3):  # it is told again with each question, and not tried each time
        site.offer(head(task("n3", 3)), 0, coming("early", 4))
        time.sleep(0.02)
    assert tried == [3, 4]
    site.offer(head(task("n4", 4)), 0)
    site.go(4)
    assert reply_of(site.wait("done", "n4")).status == "ok"
    assert site.worker.given == [3, 4]


def test_early_work_at_which_the_trainer_fails_is_tried_again_when_it_is_asked_for(
    site: Site, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say: there may be room when it is asked for. Else its failure would be handed in then."""
    net.is_open.set()
    answer, tried = site.worker._answer, list[str]()

    def failing(of: Task, orders_before: int) -> None:
        tried.append(of.nonce)
        if of.nonce == "early":
            site.worker._put(Replied(failure_reply(seal(of), "ada", "StateError: no space"), is_last=False))
        else:
            answer(of, orders_before)

    monkeypatch.setattr(site.worker, "_answer", failing)
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    site.go(3)
    site.go(4)
    site.wait("done", "n3")
    until(lambda: tried == ["n3", "early"] and site._early is None)
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    time.sleep(0.05)
    assert tried == ["n3", "early"]  # told again, and not tried each time
    site.offer(head(task("n4", 4)), 0)
    assert reply_of(site.wait("done", "n4")).status == "ok"


@pytest.mark.parametrize("number", [3, 5])
def test_what_does_not_follow_is_not_begun(site: Site, net: Net, number: int) -> None:
    net.is_open.set()
    site.offer(head(task("n3", 3)), 0, coming("early", number))
    site.go(3)
    site.wait("done", "n3")
    time.sleep(0.1)
    assert site.worker.given == [3]


def test_what_comes_next_may_be_told_after_the_work_was_done(site: Site, net: Net) -> None:
    net.is_open.set()
    site.offer(head(task("n3", 3)), 0)
    site.go(3)
    site.wait("done", "n3")
    site.offer(head(task("n3", 3)), 0, coming("early", 4))
    until(lambda: site.worker.given == [3, 4])


def test_a_task_of_another_run_is_not_what_comes_next(site: Site) -> None:
    with pytest.raises(WireError, match="of run other"):
        site.offer(head(task("n3", 3)), 0, (head(task("early", 4, run="other")), 0))
    assert site.worker.given == []


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


def test_a_task_that_was_refused_before_it_began_is_not_begun(tmp_path: Path) -> None:
    """Its node's hours ended while the trainer still obeyed an order to leave other work."""
    release = Event()

    def slow(of: Task) -> Sealed:
        assert of.nonce != "n1" or release.wait(DEADLINE_S)
        return ok(of)

    with desk(tmp_path, slow) as here:
        here.offer(head(task("n1")), 0)
        here.wait("training", "n1")
        here.offer(head(task("n2", number=4)), 0)
        here.refuse(head(task("n2", number=4)), "CapReachedError: outside its hours")
        assert reply_of(here.wait("done", "n2")).status == "failed"
        release.set()
        time.sleep(0.1)
        assert here.begun == ["n1"]
        assert reply_of(here.standing()).status == "failed"


def test_a_task_of_another_run_is_no_task(tmp_path: Path) -> None:
    with desk(tmp_path, ok) as here, pytest.raises(WireError, match="of run other"):
        here.offer(head(task("n1", run="other")), 0)


def test_an_error_after_the_update_was_begun_to_be_sent_is_told_once(
    site: Site, net: Net, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer has written its update and dies while it saves its state: no more of the update moves."""
    begin = Site._begin_sending

    def dies(self: Site, job: Job, update: Written) -> None:
        begin(self, job, update)
        raise OSError("the trainer died")

    monkeypatch.setattr(Site, "_begin_sending", dies)
    site.offer(head(task("n3", 3)), 0)
    site.go(3)
    assert reply_of(site.wait("done", "n3")).status == "failed"
    net.is_open.set()
    time.sleep(0.05)
    assert net.sent == []
    assert capsys.readouterr().out.count("round 3:") == 1
