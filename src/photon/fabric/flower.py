"""Fabric `flower`: nodes on other machines, reached through Flower for what is small, a blob store for what is large.

A thread asks every node that is online how it is (`photon.fabric.control`); the question carries the node's open task.
The base of a task is published once for all nodes. A finished update lies in a file when it is handed to the
Aggregator, which reads it one tensor at a time. Flower's run is disposable: when the SuperLink forgets it, another is
started and the next question says everything again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Event, RLock, Thread

from photon.errors import FabricError, PhotonError, ReplyRefusedError, WireError
from photon.events import NodeProgress
from photon.fabric.base import Arrival, FabricEvent, Lost, NodeInfo
from photon.fabric.control import Ask, NodeStatus, ask_content, progress_of, read_status
from photon.fabric.fleet import NodeKeys
from photon.fabric.flower_run import FlowerReply, FlowerRun
from photon.fabric.flwr_internals import FlowerDownError
from photon.link.body import Body
from photon.link.store import BlobError, BlobStore
from photon.link.update import Sealed, Task, decode_message, expect_reply, expect_task

_STEP_S = 0.25  # how often open questions are looked after
_LOOK_S = 1.5  # how often the SuperLink is asked who is online
_BEAT_S = 8.0
_IDLE_WAIT_S = 20.0
_MAX_WAIT_S = 15.0
_MARGIN_S = 10.0  # a question is given up this long after its answer was due
_FETCH_ATTEMPTS = 3
_HEADER_BYTES = 2**21  # what an update may hold beside its tensors
_TICKET_SLACK_S = 2 * 3600.0


@dataclass
class Peer:
    """A node as the Aggregator's side knows it. Guarded by the fabric's lock."""

    info: NodeInfo
    node_id: int | None = None
    activated_at: str = ""
    is_online: bool = False
    status: NodeStatus | None = None
    heard_at: float = 0.0  # Unix seconds of its last answer
    last_error: str = ""
    task: Sealed | None = None  # open, and not answered yet
    nonce: str = ""
    coming: Sealed | None = None  # what it will most likely be asked after that
    sent_at: float = 0.0
    dropped: str = ""
    question: str = ""  # id of the message that waits for an answer
    question_nonce: str = ""
    question_due: float = 0.0
    fetching: Future[Sealed] | None = None
    failed_fetches: int = 0
    ask_after: float = 0.0

    def forget_question(self) -> None:
        """Nothing is to be expected any more of what it was asked last."""
        self.question, self.question_nonce, self.question_due = "", "", 0.0


@dataclass(frozen=True)
class BlobPlane:
    """How model bytes travel beside Flower. `kept` are published blobs that tell no base.

    An update may be `payload_bytes` long, the exact model or more, and what it holds beside its tensors. `sent` reads
    what the network has carried so far: bytes (down, up) per node.
    """

    store: BlobStore
    payload_bytes: int
    kept: frozenset[str] = frozenset()
    sent: Callable[[], Mapping[str, tuple[int, int]]] = dict


class FlowerFabric:
    """Implements the fabric protocol over the SuperLink at `superlink` (host:port on loopback).

    Nodes must have prepared for the recipe of that sha256, as it is in the run card.
    `infos` are the nodes of the recipe; whoever else is registered is never asked. One thread may use the public
    methods; a second one, started here, does the asking.
    """

    def __init__(
        self,
        run: str,
        recipe_sha256: str,
        superlink: str,
        secret: bytes,
        infos: Collection[NodeInfo],
        plane: BlobPlane,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._run, self._recipe_sha256 = run, recipe_sha256
        self._superlink, self._secret, self._note = superlink, secret, note
        self._plane, self._store, self._kept = plane, plane.store, plane.kept
        self._peers = {info.name: Peer(info) for info in infos}
        keys = NodeKeys(secret)
        self._names = {keys.public(name): name for name in self._peers}
        self._events: SimpleQueue[FabricEvent] = SimpleQueue()
        self._lock, self._wake, self._closing = RLock(), Event(), Event()
        self._flower: FlowerRun | None = None
        self._last_beat = self._last_look = 0.0
        self._down_since: float | None = time.monotonic()
        self._base = ""  # sha256 of the base of the newest task; the bodies that are published tell it in all its forms
        self._tasked: set[str] = set()  # nodes that this process has given a task to
        self._fetchers = ThreadPoolExecutor(2, thread_name_prefix="photon-fetch")
        self._thread = Thread(target=self._work, name="photon-flower", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> int:
        """Every node has its own hardware: all work at the same time."""
        return len(self._peers)

    def nodes(self) -> list[NodeInfo]:
        """The nodes that are online and prepared for this run."""
        with self._lock:
            return [peer.info for peer in self._peers.values() if self._is_ready(peer)]

    def send(self, node: str, message: Sealed) -> None:
        """Open a task: publish its base, allow one upload, and let the next question carry it."""
        if self._closing.is_set():
            raise FabricError("the flower fabric is closed")
        if node not in self._peers:
            raise FabricError(f"no node is called {node!r}")
        task = expect_task(decode_message(message))
        if node in self._tasked:  # what was uploaded for the task before has been merged, or never will be
            self._store.discard(node)
        self._tasked.add(node)
        self._publish(task, message.body)
        # As long as a node tries (`errands`): grace and the lateness that a part allows begin where its deadline ends.
        until = time.time() + 2 * task.deadline_s + _TICKET_SLACK_S
        self._store.allow(node, self._plane.payload_bytes + _HEADER_BYTES, until)
        with self._lock:
            peer = self._peers[node]
            peer.task, peer.nonce, peer.sent_at = Sealed(message.head, message.body), task.nonce, time.time()
            peer.coming, peer.fetching, peer.failed_fetches = None, None, 0
        self._wake.set()

    @property
    def foretells(self) -> bool:
        """Yes: what takes a network can be done while nodes train."""
        return True

    def foretell(self, node: str, message: Sealed) -> None:
        """Publish the base after this one, and let the next question say what it is for."""
        task = expect_task(decode_message(message))
        try:
            if len(message.body):
                self._store.publish(task.body_sha256, message.body)
        except BlobError as error:  # it is published again when it is needed
            self._note(f"what comes next cannot be told yet: {error}")
            return
        with self._lock:
            peer = self._peers[node]
            if peer.task is not None:
                peer.coming = Sealed(message.head, message.body)
        self._wake.set()

    def _publish(self, task: Task, body: Body) -> None:
        """Make a task's body available; with the first task from a new base, those that told another one go."""
        if len(body):
            self._store.publish(task.body_sha256, body)
        if task.base_sha256 != self._base:
            self._base = task.base_sha256
            for other in self._store.published() - self._kept - {task.body_sha256}:
                self._store.retract(other)

    def receive(self, timeout_s: float) -> FabricEvent | None:
        """The next event, or None after `timeout_s`. Raises FabricError if the fabric is closed."""
        if self._closing.is_set():
            raise FabricError("the flower fabric is closed")
        try:
            return self._events.get(timeout=max(0.0, timeout_s))
        except Empty:
            return None

    def abandon(self, node: str) -> None:
        """Stop waiting for the node's task, and tell the node so."""
        with self._lock:
            peer = self._peers[node]
            if peer.task is not None:
                peer.dropped, peer.task, peer.nonce, peer.coming = peer.nonce, None, "", None
                peer.forget_question()  # so that it is told at once
        self._wake.set()

    def carried(self) -> Mapping[str, tuple[int, int]] | None:
        """What the gateway has counted of every node."""
        return self._plane.sent()

    def close(self) -> None:
        """End Flower's run and remove what was published and uploaded; nodes stay, for the next run."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        self._thread.join(_MARGIN_S)
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        try:
            for sha256 in self._store.published() - self._kept:
                self._store.retract(sha256)
            for node in self._tasked:
                self._store.discard(node)
        except BlobError as error:  # a store that is gone now; what is left there is of no use to anybody
            self._note(f"what was in flight could not be removed: {error}")

    def peers(self) -> list[Peer]:
        """Copies of what is known of every node of the recipe."""
        with self._lock:
            return [replace(peer) for peer in self._peers.values()]

    def _is_ready(self, peer: Peer) -> bool:
        status = peer.status
        return peer.is_online and status is not None and status.run == self._run and status.state == "ready"

    # The thread that asks.

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(_STEP_S)
            self._wake.clear()
            try:
                self._step()
                self._down_since = None
            except FlowerDownError as error:
                self._lost_flower(error)
            except PhotonError as error:  # one node's affair, or the store's; the others must not wait for it
                self._note(f"flower fabric: {error}")
            except Exception as error:  # noqa: BLE001  # without this thread no node would ever be asked again
                self._note(f"flower fabric: {type(error).__name__}: {error}")
        if self._flower is not None:
            self._flower.close()

    def _step(self) -> None:
        if self._flower is None:
            self._flower = FlowerRun(self._superlink, self._secret)
            self._last_beat = time.monotonic()
            with self._lock:
                for peer in self._peers.values():
                    peer.forget_question()
        now = time.monotonic()
        if now - self._last_beat > _BEAT_S:
            self._flower.heartbeat()
            self._last_beat = now
        if now - self._last_look > _LOOK_S:
            self._look(self._flower)
            self._last_look = now
        self._collect(self._flower)
        self._ask_all(self._flower)
        self._finish_fetches()

    def _lost_flower(self, error: FlowerDownError) -> None:
        """Flower is gone or has forgotten us. A run that it refuses is given up for another; a silent one is kept."""
        if self._down_since is None:
            self._down_since = time.monotonic()
            self._note(f"Flower does not answer, trying again: {error}")
        if error.status and self._flower is not None:
            self._flower.close()
            self._flower = None
        self._closing.wait(1.0)

    def _look(self, run: FlowerRun) -> None:
        """Who is online. A node that was started anew is asked anew: what it was asked before is lost with it."""
        found = {self._names[node.key]: node for node in run.nodes() if node.is_online and node.key in self._names}
        with self._lock:
            for name, peer in self._peers.items():
                node = found.get(name)
                if node is None:
                    if peer.is_online:
                        self._progress(name, "its connection is lost; waiting for it")
                    peer.is_online = False
                    peer.forget_question()
                    continue
                if (node.node_id, node.activated_at) != (peer.node_id, peer.activated_at):
                    peer.forget_question()
                peer.node_id, peer.activated_at, peer.is_online = node.node_id, node.activated_at, True

    def _progress(self, name: str, note: str) -> None:
        if self._peers[name].task is not None:
            self._events.put(NodeProgress(node=name, round=0, state="waiting", note=note))

    def _ask_all(self, run: FlowerRun) -> None:
        for name in self._peers:
            with self._lock:
                peer = self._peers[name]
                if not peer.is_online or peer.node_id is None or time.monotonic() < peer.ask_after:
                    continue
                is_open = peer.question and time.monotonic() < peer.question_due
                if is_open and peer.question_nonce == peer.nonce:
                    continue
                node_id, nonce, wait_s = peer.node_id, peer.nonce, self._patience(peer)
                nothing = Sealed(b"", b"")
                task, coming = peer.task or nothing, peer.coming or nothing
                ask = Ask(
                    run=self._run,
                    recipe_sha256=self._recipe_sha256,
                    wait_s=wait_s,
                    base_bytes=len(task.body),
                    coming_bytes=len(coming.body),
                    dropped=peer.dropped,
                )
            try:
                question = run.push(node_id, ask_content(ask, task.head, coming.head), wait_s + _MARGIN_S)
            except FlowerDownError as error:
                if error.status != 404:
                    raise
                peer.ask_after = time.monotonic() + _LOOK_S  # it went offline this moment, or takes none
                continue
            with self._lock:
                peer.question, peer.question_nonce = question, nonce
                peer.question_due = time.monotonic() + wait_s + _MARGIN_S

    def _patience(self, peer: Peer) -> float:
        """How long its answer may wait for news: short when something is about to happen, long when not."""
        if peer.status is None or peer.status.run != self._run:
            return 2.0
        if peer.task is None:
            return _IDLE_WAIT_S
        return min(_MAX_WAIT_S, 2.0 + (time.time() - peer.sent_at) / 20)

    def _collect(self, run: FlowerRun) -> None:
        with self._lock:
            asked = {peer.question: peer for peer in self._peers.values() if peer.question}
        for reply in run.pull(asked) if asked else []:
            with self._lock:
                peer = asked.get(reply.message_id)
                if peer is not None and peer.question == reply.message_id:
                    peer.forget_question()
                    self._take(peer, reply)

    def _take(self, peer: Peer, reply: FlowerReply) -> None:
        if reply.node_id != peer.node_id:
            return
        if reply.content is None and not reply.junk:
            return  # gone, or too late: it is asked again when it is online
        name = peer.info.name
        try:
            if reply.content is None:
                raise WireError(reply.junk)
            status, head = read_status(reply.content)
        except WireError as error:
            peer.last_error, peer.ask_after = str(error), time.monotonic() + _LOOK_S
            return
        peer.status, peer.heard_at, peer.dropped = status, time.time(), ""
        if peer.task is None or status.nonce != peer.nonce:
            return
        if head and status.phase == "done":
            if peer.fetching is None:
                peer.fetching = self._fetchers.submit(self._fetch, name, peer.nonce, head, status.body_bytes)
        elif status.phase != "done":
            self._events.put(progress_of(name, status))

    def _fetch(self, name: str, nonce: str, head: bytes, size: int) -> Sealed:
        """The whole reply; its body is in a file. Raises BlobError, OSError, or ReplyRefusedError if it is no answer.

        A header that makes no sense is handed on as it is: the Aggregator refuses it, and charges its node.
        """
        try:
            reply = expect_reply(decode_message(Sealed(head, b"")))
        except WireError:
            return Sealed(head, b"")
        if reply.node == name and reply.nonce != nonce:
            raise ReplyRefusedError("it hands in the reply to another task than the one that it says it has done")
        return Sealed(head, self._store.fetch(name, reply.body_sha256, size) if size else b"")

    def _finish_fetches(self) -> None:
        """Hand finished updates to the Aggregator; one that is not to be found after several tries loses its node."""
        with self._lock:
            for name, peer in self._peers.items():
                if peer.fetching is None or not peer.fetching.done():
                    continue
                future, peer.fetching = peer.fetching, None
                if peer.task is None:
                    continue
                try:
                    self._events.put(Arrival(name, future.result()))
                except ReplyRefusedError as error:
                    peer.last_error = str(error)
                    self._events.put(Lost(name, peer.last_error))
                except (BlobError, OSError) as error:
                    peer.failed_fetches += 1
                    peer.ask_after = time.monotonic() + _LOOK_S * 2**peer.failed_fetches
                    peer.last_error = f"its update cannot be fetched: {error}"
                    if peer.failed_fetches < _FETCH_ATTEMPTS:
                        continue
                    self._events.put(Lost(name, peer.last_error))
                peer.task, peer.nonce, peer.coming = None, "", None
