"""A node with a valid key that lies: it speaks the real protocol over real sockets, and says what a test wants.

It trains nothing. What it hands in is a made-up update of the right names and shapes, honest in all but the one thing
that its lie changes. `Lie`s stand in tests/faults/lies.py.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from photon.fabric.control import NodeStatus, read_ask, status_content
from photon.fabric.fleet_client import FleetClient, Question
from photon.fabric.flwr_internals import FlowerDownError
from photon.identity import client_context
from photon.link.body import whole_file
from photon.link.client import GatewayClient, LinkRefusedError
from photon.link.tensors import decode_tensors, encode_tensors, sha256_hex
from photon.link.transfer import download, upload
from photon.link.update import EvaluationReport, Reply, Sealed, Task, TrainingReport, decode_message, expect_task, seal

_POLL_S, _BEAT_S, _DEADLINE_S = 0.1, 5.0, 60.0
TOKENS_PER_STEP = 64  # of the recipe in tests/faults/sites.py: two sequences of 32


@dataclass
class Hand:
    """What it says it has done. `before`: other answers, one for each question, that come first."""

    head: bytes = b""
    body_bytes: int = 0
    before: list[Callable[[Question], None]] = field(default_factory=list)


Lie = Callable[["Liar", Task], Hand]


class Liar:
    """Takes part as `name` on a thread of its own, from `start` to `close`; `lie_of` says which lie a task gets."""

    def __init__(self, name: str, key: Path, url: str, folder: Path, lie_of: Callable[[Task], Lie]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder, self._lie_of = name, folder, lie_of
        context = client_context(key)
        self.client = GatewayClient(url, context)
        self.fleet = FleetClient(url, context)
        self.answers: dict[str, int] = {}  # HTTP status by what it tried
        self.heard: set[str] = set()  # what the Aggregator said of it in its status
        self.failures: list[str] = []  # of this class, not of its lies
        self.bases: dict[str, dict[str, Tensor]] = {}
        self.hands: list[Hand] = []
        self.asked_at = 0.0  # monotonic seconds of the last question
        self._run = ""
        self._nonce, self._hand = "", Hand()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="liar", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(_DEADLINE_S)
        self.fleet.close()
        self.client.close()

    # What lies are made of.

    def base(self, task: Task) -> dict[str, Tensor]:
        """The weights that the task starts from, downloaded as a node does."""
        if task.base_sha256 not in self.bases:
            path = self.folder / task.base_sha256
            download(self.client, task.base_sha256, path, streams=1, deadline_s=_DEADLINE_S)
            self.bases[task.base_sha256] = decode_tensors(path.read_bytes())
        return self.bases[task.base_sha256]

    def update(self, task: Task) -> dict[str, Tensor]:
        """What could be the update of an honest node: every tensor, and a length that nobody would remark on."""
        dice = torch.Generator().manual_seed(task.round)
        return {name: 1e-3 * torch.randn(like.shape, generator=dice) for name, like in self.base(task).items()}

    def head(self, task: Task, body: bytes, report: Mapping[str, Any] | None = None, **changes: Any) -> bytes:
        """The header of a reply that hands in `body`; `report` changes what it says of its training."""
        training = TrainingReport(
            tokens=task.tau * TOKENS_PER_STEP,
            steps=task.tau,
            loss_first=5.0,
            loss_last=4.0,
            loss_mean=4.5,
            gradient_norm_mean=1.0,
            clipped_steps=0,
            learning_rate=1e-3,
            seconds=1.0,
            epoch=0.1,
        ).model_copy(update=dict(report or {}))
        scores = EvaluationReport(nats=300.0, tokens=100, text_bytes=200.0, unigram_nats=310.0, seconds=0.1)
        reply = Reply(
            run=task.run,
            round=task.round,
            node=self.name,
            nonce=task.nonce,
            base_sha256=task.base_sha256,
            status="ok",
            body_sha256=sha256_hex(body),
            training=training if task.tau else None,
            evaluation=scores if task.evaluate else None,
        )
        return seal(reply.model_copy(update=changes)).head

    def hand_in(self, task: Task, body: bytes, report: Mapping[str, Any] | None = None, **changes: Any) -> Hand:
        """Upload `body` as a node does, and speak of it in a reply."""
        if body:
            self.upload(body)
        return Hand(self.head(task, body, report, **changes), len(body))

    def hand_in_values(
        self, task: Task, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], **changes: Any
    ) -> Hand:
        """Hand in the honest-looking update with its tensors changed."""
        return self.hand_in(task, encode_tensors(change(self.update(task))), **changes)

    def upload(self, body: bytes) -> None:
        path = self.folder / "upload"
        path.write_bytes(body)
        upload(self.client, sha256_hex(body), whole_file(path), streams=1, deadline_s=_DEADLINE_S)

    def attempt(
        self, what: str, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """A request to the gateway whose HTTP status is noted under `what`."""
        try:
            self.client.call(method, path, body, headers)
            self.answers[what] = 200
        except LinkRefusedError as error:
            self.answers[what] = error.status

    def note(self, what: str, call: Callable[[], object]) -> None:
        """A call of Flower's whose HTTP status is noted under `what`."""
        try:
            call()
            self.answers[what] = 200
        except FlowerDownError as error:
            self.answers[what] = error.status

    def status(self, **changes: Any) -> NodeStatus:
        """How it says it is."""
        plain = NodeStatus(photon="0.1.0", run=self._run, state="ready", tokens_available=10_000)
        return plain.model_copy(update=changes)

    # The thread.

    def _work(self) -> None:
        try:
            self._run = self.client.json("GET", "/v1/run")["run"]
            while self._bear(lambda: self.fleet.join(None)) is None and not self._stop.is_set():
                pass  # the SuperLink comes up later than the gateway
            beaten = time.monotonic()
            while not self._stop.wait(_POLL_S):
                if time.monotonic() - beaten > _BEAT_S:
                    beaten = time.monotonic()
                    self._bear(self.fleet.heartbeat)
                question = self._bear(self.fleet.pull)
                if isinstance(question, Question):
                    self.asked_at = time.monotonic()
                    self._answer(question)
                self._listen()
            self._bear(self.fleet.leave)
        except Exception as error:  # noqa: BLE001  # a test must hear of it
            self.failures.append(f"{type(error).__name__}: {error}")

    def _bear(self, call: Callable[[], object]) -> object:
        """The Aggregator may be away for a moment, or already gone at the end of a run."""
        try:
            return call()
        except FlowerDownError:
            self._stop.wait(1.0)
            return None

    def _answer(self, question: Question) -> None:
        _, head = read_ask(question.content)
        if not head:
            self._bear(lambda: self.fleet.reply(question, status_content(self.status(), b"")))
            return
        task = expect_task(decode_message(Sealed(head, b"")))
        if task.nonce != self._nonce:
            self._hand = self._lie_of(task)(self, task)
            self.hands.append(self._hand)
            self._nonce = task.nonce
        if self._hand.before:
            self._hand.before.pop(0)(question)
            return
        status = self.status(
            nonce=task.nonce,
            phase="done",
            round=task.round,
            step=task.tau,
            steps=task.tau,
            body_bytes=self._hand.body_bytes,
        )
        self._bear(lambda: self.fleet.reply(question, status_content(status, self._hand.head)))

    def _listen(self) -> None:
        if not self._hand.before:
            return
        answer = json.loads(self.client.call("GET", "/v1/status"))
        self.heard.add(answer["nodes"][self.name]["last_error"])


def honest(liar: Liar, task: Task) -> Hand:
    """No lie: an update as good as any."""
    return liar.hand_in_values(task, lambda update: update) if task.tau else liar.hand_in(task, b"")
