"""`photon node`: one owner's node. Outbound connections only; nothing that the network sends is ever executed.

The main thread asks Flower for questions and answers them (`photon.fabric.control`); a second one keeps the node
online; the task itself is done by `photon.fabric.errands`. When a run begins, its text is prepared on a thread of its
own. A network that is gone is waited for; an identity that is refused ends the node with a sentence that says what to
do.
"""

from __future__ import annotations

import os
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Event, Lock, Thread

from photon import __version__
from photon.data.build import Progress
from photon.durable import only_process
from photon.errors import InputError, PhotonError, WireError
from photon.fabric.card import read_card
from photon.fabric.control import NodeStatus, read_ask, read_coming, status_content
from photon.fabric.discretion import say
from photon.fabric.errands import Errands
from photon.fabric.fleet_client import FleetClient, Question
from photon.fabric.flwr_internals import RUN_ENDED, FlowerDownError
from photon.fabric.home import NodeHome, PreparedRun, prepare_run
from photon.fabric.training import Training
from photon.link.client import GatewayClient, LinkDownError, LinkError, LinkRefusedError
from photon.link.update import Sealed, decode_message, expect_task
from photon.siteconfig import SiteConfig

POLL_S = 1.0
_BEAT_S = 8.0
_LONGEST_PAUSE_S = 15.0
_WRITE_TRAFFIC_S = 30.0
_REFUSED = (401, 403)
LEAVE_DEADLINE_S = 120.0


class NodeRefusedError(PhotonError):
    """The Aggregator does not take this node; trying again would not change that (exit code 2: a person must act)."""

    exit_code = 2


@dataclass(frozen=True)
class NodeOptions:
    """Who the node is, where it joins, what its owner decided; `check_key` raises InputError once its key expired."""

    name: str
    url: str
    context: ssl.SSLContext
    check_key: Callable[[], None]
    site: SiteConfig
    home: NodeHome
    leave_deadline_s: float = LEAVE_DEADLINE_S


@dataclass
class _Preparation:
    """A run that is being prepared, or could not be."""

    run: str
    recipe_sha256: str
    prepared: PreparedRun | None = None
    note: str = "preparing"
    failed: Exception | None = None
    thread: Thread | None = field(default=None, repr=False)

    @property
    def of(self) -> tuple[str, str]:
        """What it is for: another run, or another recipe of it, has to be prepared anew."""
        return self.run, self.recipe_sha256


class Agent:
    """The node's process. `run` returns when the node has left; raises what its owner must mend."""

    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self._client = GatewayClient(options.url, options.context)
        self._fleet = FleetClient(options.url, options.context)
        self._news, self._leaving, self._stopping = Event(), Event(), Event()
        self._preparation: _Preparation | None = None
        self._errands: Errands | None = None
        self._held: Question | None = None
        self._answer_at, self._has_news = 0.0, False
        self._traffic_lock = Lock()
        self._today = datetime.now().date()
        self._bytes_today = options.home.bytes_of(self._today)
        self._largest_update_bytes = 0
        self._leave_by: float | None = None
        self._told_down: type[Exception] | None = None
        self._told = ""  # nonce of the finished task that was told to the Aggregator
        self._delivered = ""  # and of the one for which it has stopped asking since
        self._traffic_written = time.monotonic()

    def run(self) -> None:
        """Take part until the owner says otherwise (SIGTERM or SIGINT: hand in what there is, then leave)."""
        options = self._options
        try:
            options.home.path.mkdir(parents=True, exist_ok=True)
            options.home.lock.touch()
        except OSError as error:
            raise InputError(
                f"{options.home.path} cannot hold what this node keeps ({error.strerror}): name another --state"
            ) from None
        with only_process(options.home.lock, f"{options.home.path} is used by another photon node"), self._signals():
            say(f"node {options.name}, Aggregator {options.url}, state in {options.home.path}")
            beats = Thread(target=self._beat, name="photon-heartbeat", daemon=True)
            try:
                self._join()
                beats.start()
                while not self._has_left():
                    self._turn()
            finally:
                self._stopping.set()
                self._end()

    # Joining, staying and leaving.

    def _join(self) -> None:
        """Learn of the run, and go online. Tries for as long as it takes; a refusal ends it."""
        pause_s = 1.0
        while not self._leaving.is_set():
            try:
                self._learn_of_run()
                self._options.home.keep_id(self._fleet.join(self._options.home.last_id()))
            except (FlowerDownError, LinkDownError) as error:
                self._down(error)
            except LinkRefusedError as error:
                raise NodeRefusedError(str(error)) from error
            else:
                say("online")
                self._told_down = None
                return
            self._leaving.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _beat(self) -> None:
        while not self._stopping.wait(_BEAT_S):
            try:
                if not self._fleet.heartbeat():
                    self._fleet.join(self._options.home.last_id())
            except FlowerDownError:
                pass  # the main thread meets the same trouble, and says so

    def _has_left(self) -> bool:
        if not self._leaving.is_set():
            return False
        if self._leave_by is None:
            self._leave_by = time.monotonic() + self._options.leave_deadline_s
            say(f"leaving: handing in what there is, at most {self._options.leave_deadline_s:g} s")
        is_busy = self._errands is not None and self._errands.hand_in()
        standing = self._errands.standing() if self._errands is not None else None
        is_handed_in = standing is not None and standing.phase == "done" and standing.nonce == self._delivered
        return not is_busy or is_handed_in or time.monotonic() > self._leave_by

    def _end(self) -> None:
        if self._errands is not None:
            self._errands.close()
        with suppress(FlowerDownError):  # if that fails, it is missed after two heartbeats
            self._fleet.leave()
        self._fleet.close()
        self._client.close()
        self._write_traffic()
        say("left")

    # One turn of the main thread.

    def _turn(self) -> None:
        if self._news.wait(POLL_S):
            self._news.clear()
            self._has_news = True
        if self._errands is not None and not self._options.site.caps.is_open(datetime.now()):
            self._errands.hand_in()  # what was begun within its hours is not trained on beyond them
        try:
            self._follow_preparation()
            question = self._fleet.pull()
            if question is not None:
                before, self._held = self._held, None
                self._hear(question)
                if before is not None:
                    self._answer(before)  # by what is known now
            if self._held is not None and (self._has_news or time.monotonic() >= self._answer_at):
                held, self._held = self._held, None
                self._answer(held)
                self._has_news = False
            self._told_down = None
            if time.monotonic() - self._traffic_written > _WRITE_TRAFFIC_S:
                self._write_traffic()
        except FlowerDownError as error:
            reason = self._reason_of(error)
            if error.code != RUN_ENDED:  # the question was of a run of Flower's that is over; another will come
                self._down(reason)
                self._leaving.wait(2.0)

    def _hear(self, question: Question) -> None:
        self._held, self._answer_at = question, question.received
        try:
            ask, head = read_ask(question.content)
            self._answer_at = question.received + (0.0 if self._leaving.is_set() else ask.wait_s)
            if self._told and self._told != (expect_task(decode_message(Sealed(head, b""))).nonce if head else ""):
                self._delivered = self._told
            asked = (ask.run, ask.recipe_sha256)
            if self._preparation is None or (self._preparation.of != asked and self._preparation.thread is None):
                self._learn_of_run()
            if self._errands is None or self._preparation is None or self._preparation.of != asked:
                return
            if ask.dropped:
                self._errands.drop(ask.dropped)
            if not head or self._leaving.is_set():
                return
            # What goes up may be larger than what comes down: a base that the node holds comes as nothing.
            update_bytes = max(ask.base_bytes, self._largest_update_bytes)
            resting = self._resting(ask.base_bytes + update_bytes)
            if resting and self._errands.standing().phase in ("idle", "done"):
                self._errands.refuse(head, f"CapReachedError: {resting}")
                return
            follows = read_coming(question.content)
            if follows and self._resting(ask.base_bytes + ask.coming_bytes + 2 * update_bytes):
                follows = b""  # when it is asked for it will be refused
            self._errands.offer(head, ask.base_bytes, (follows, ask.coming_bytes) if follows else None)
        except (WireError, LinkError) as error:
            say(f"a question that cannot be followed: {error}")

    def _answer(self, question: Question) -> None:
        standing = self._errands.standing() if self._errands is not None else None
        preparation = self._preparation
        prepared = preparation.prepared if preparation is not None else None
        resting = self._resting(0)
        state = "leaving" if self._leaving.is_set() else "resting" if resting else "ready" if standing else "preparing"
        status = NodeStatus(
            photon=__version__,
            run=prepared.run if prepared is not None and standing is not None else "",
            state=state,  # type: ignore[arg-type]  # one of the four that stand above
            note=(resting or (standing.note if standing else preparation.note if preparation else ""))[:300],
            nonce=standing.nonce if standing else "",
            phase=standing.phase if standing else "idle",  # type: ignore[arg-type]  # Standing only has such
            round=standing.round if standing else 0,
            step=standing.step if standing else 0,
            steps=standing.steps if standing else 0,
            loss=standing.loss if standing else None,
            body_bytes=standing.body_bytes if standing else 0,
            tokens_available=prepared.tokens_available if prepared else 0,
            tokens_per_second=standing.tokens_per_second if standing else 0.0,
        )
        self._fleet.reply(question, status_content(status, standing.head if standing else b""))
        if standing is not None and standing.phase == "done":
            self._told = standing.nonce
            self._largest_update_bytes = max(self._largest_update_bytes, standing.body_bytes)

    # The run, and its preparation.

    def _learn_of_run(self) -> None:
        """Ask the gateway for the run and its recipe, and begin to prepare that unless it is done or going on."""
        card, recipe = read_card(self._client.json("GET", "/v1/run"))
        preparation = self._preparation
        known = (card.run, card.recipe_sha256)
        if preparation is not None and (preparation.of == known or preparation.thread is not None):
            return
        if self._errands is not None:
            self._errands.close()
            self._errands = None
        preparation = _Preparation(card.run, card.recipe_sha256)

        def report(progress: Progress) -> None:
            share = f" {progress.done_bytes / progress.total_bytes:.0%}" if progress.total_bytes else ""
            preparation.note = f"{progress.phase}{share}"

        def work() -> None:
            options = self._options
            try:
                preparation.prepared = prepare_run(
                    card, recipe, options.name, options.site, options.home, self._client, report
                )
            except Exception as error:  # noqa: BLE001  # the main thread raises it
                preparation.failed = error

        say(f"run {card.run}: preparing")
        preparation.thread = Thread(target=work, name="photon-prepare", daemon=True)
        self._preparation = preparation
        preparation.thread.start()

    def _follow_preparation(self) -> None:
        preparation = self._preparation
        if preparation is None or preparation.thread is None or preparation.thread.is_alive():
            return
        preparation.thread = None
        if isinstance(preparation.failed, LinkDownError):
            self._preparation = None  # the next question begins it again
            self._down(preparation.failed)
        elif isinstance(preparation.failed, OSError):
            raise InputError(f"run {preparation.run} cannot be prepared here: {preparation.failed}")
        elif preparation.failed is not None:
            raise preparation.failed
        elif preparation.prepared is not None:
            prepared = preparation.prepared
            say(
                f"run {prepared.run}: ready on {prepared.plan.device}, {prepared.plan.threads} threads, "
                f"{prepared.tokens_available:,} tokens"
            )
            site, home = self._options.site, self._options.home
            training = Training(prepared.folder, prepared.plan)
            self._errands = Errands(prepared.run, training, home, self._client, site.streams, self._news, self._count)
            self._news.set()

    # What the owner grants.

    def _resting(self, coming_bytes: int) -> str:
        """Why the node takes no task now; empty if it does."""
        caps = self._options.site.caps
        if not caps.is_open(datetime.now()):
            return "outside its hours"
        limit = caps.daily_bytes
        if limit is not None and self._bytes_today + coming_bytes > limit:
            return "its bytes for today are used up"
        return ""

    def _count(self, count: int) -> None:
        with self._traffic_lock:
            today = datetime.now().date()
            if today != self._today:
                self._today, self._bytes_today = today, 0
            self._bytes_today += count

    def _write_traffic(self) -> None:
        self._traffic_written = time.monotonic()
        with self._traffic_lock:
            try:
                self._options.home.keep_bytes(self._today, self._bytes_today)
            except OSError as error:  # a disk that is full now may not be later; meanwhile the bytes are counted here
                say(f"today's bytes cannot be written down: {error.strerror}")

    # Trouble.

    def _down(self, error: Exception) -> None:
        self._options.check_key()  # with one that has expired, no try will succeed
        if self._told_down is not type(error):
            say(f"no connection, trying again: {error}")
            self._told_down = type(error)

    def _reason_of(self, error: FlowerDownError) -> PhotonError:
        """What failed, in the gateway's words where TLS did. Raises NodeRefusedError.

        A refusal by the gateway is final, whatever this machine's clock says of the key; one by the SuperLink means
        that it has forgotten this node. What this end has against the gateway may be mended there.
        """
        is_refused = error.status in _REFUSED and error.code != RUN_ENDED
        if not is_refused and not error.is_tls:
            return error
        try:
            self._client.json("GET", "/v1/run")
        except LinkRefusedError as refusal:
            if refusal.status in _REFUSED:
                raise NodeRefusedError(str(refusal)) from error
            return refusal
        except LinkError:
            return error
        if is_refused:
            with suppress(FlowerDownError):
                self._options.home.keep_id(self._fleet.join(self._options.home.last_id()))
        return error

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def leave(number: int, frame: object) -> None:
            if self._leaving.is_set():
                os._exit(1)  # asked twice: at once
            self._leaving.set()
            self._news.set()

        before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def default_home(name: str) -> Path:
    """Where a node keeps its state unless told otherwise."""
    return Path(f"photon-node-{name}")
