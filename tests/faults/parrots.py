"""Nodes that train nothing: they speak the real protocol and hand in the same update for every task."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

from photon import __version__
from photon.fabric.control import NodeStatus, read_ask, status_content
from photon.fabric.fleet_client import FleetClient
from photon.fabric.flwr_internals import FlowerDownError
from photon.identity import client_context
from photon.link.body import whole_file
from photon.link.client import GatewayClient
from photon.link.transfer import upload
from photon.link.update import EvaluationReport, Reply, Sealed, Task, TrainingReport, decode_message, expect_task, seal

_DEADLINE_S = 120.0


class Parrot:
    """One node on a thread; `update` is a file of tensors that fit the model, with its sha256."""

    def __init__(self, name: str, bundle: Path, url: str, update: Path, sha256: str, tokens: int) -> None:
        context = client_context(bundle)
        self.name, self.update, self.sha256, self.tokens = name, update, sha256, tokens
        self._client, self._fleet = GatewayClient(url, context), FleetClient(url, context)
        self._stop = Event()
        self._done: dict[str, bytes] = {}
        self._thread = Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30)

    def _work(self) -> None:
        joined = False
        beats = 0
        while not self._stop.wait(0.3):
            try:
                if not joined:
                    self._run = str(self._client.json("GET", "/v1/run")["run"])
                    self._fleet.join(None)
                    joined = True
                beats += 1
                if beats % 20 == 0:
                    self._fleet.heartbeat()
                question = self._fleet.pull()
                if question is None:
                    continue
                _, head = read_ask(question.content)
                self._fleet.reply(question, self._answer(head))
            except FlowerDownError:
                continue  # it is asked again

    def _answer(self, head: bytes) -> dict[str, str | bytes]:
        idle = NodeStatus(photon=__version__, run=self._run, state="ready")
        if not head:
            return status_content(idle, b"")
        task = expect_task(decode_message(Sealed(head, b"")))
        if task.nonce not in self._done:
            self._done = {task.nonce: self._reply(task)}
        size = self.update.stat().st_size if task.tau else 0
        status = idle.model_copy(update={"nonce": task.nonce, "phase": "done", "round": task.round, "body_bytes": size})
        return status_content(status, self._done[task.nonce])

    def _reply(self, task: Task) -> bytes:
        training = None
        if task.tau:
            upload(self._client, self.sha256, whole_file(self.update), streams=1, deadline_s=_DEADLINE_S)
            training = TrainingReport(
                tokens=task.tau * self.tokens, steps=task.tau, loss_first=1.0, loss_last=1.0, loss_mean=1.0,
                gradient_norm_mean=1.0, clipped_steps=0, learning_rate=0.1, seconds=1.0, epoch=0.0,
            )  # fmt: skip
        evaluation = EvaluationReport(nats=2.0, tokens=1, text_bytes=1.0, unigram_nats=2.0) if task.evaluate else None
        header = {
            "run": task.run, "round": task.round, "node": task.node, "nonce": task.nonce,
            "base_sha256": task.base_sha256, "status": "ok", "training": training, "evaluation": evaluation,
        }  # fmt: skip
        if task.tau:
            header["body_sha256"] = self.sha256
        return seal(Reply.model_validate(header)).head
