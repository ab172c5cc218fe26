"""LLM Node: answers one task at a time with serialised bytes. Between tasks everything it knows is on its disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from photon.config import LinkConfig, NodeConfig
from photon.data.shards import ShardReader
from photon.data.stream import Stream
from photon.errors import WireError
from photon.events import NodeProgress
from photon.link.codecs import CODECS
from photon.link.tensors import decode_tensors, encode_tensors, sha256_hex
from photon.link.update import (
    EvaluationReport,
    Reply,
    Task,
    TrainingReport,
    decode_message,
    encode_message,
    expect_task,
)
from photon.model.build import load_weights, named_weights
from photon.node.optimizers import import_state, state_views
from photon.node.state import NodeStore
from photon.node.trainer import Trainer


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of one source, int64 [n, sequence + 1], with what turns nats into bits per byte."""

    sequences: np.ndarray
    bytes_per_token: float
    unigram_loss: float


@dataclass(frozen=True)
class Site:
    """What belongs to one owner and stays there."""

    name: str
    batch_size: int
    stream: Stream
    heldout: Sequence[HeldOut]
    store: NodeStore


def held_out(reader: ShardReader, sequence_length: int, max_sequences: int) -> HeldOut:
    """The evaluation set of one source."""
    return HeldOut(reader.heldout(sequence_length, max_sequences), reader.bytes_per_token_heldout, reader.unigram_loss)


def score(trainer: Trainer, parts: Iterable[HeldOut], batch_size: int) -> EvaluationReport:
    """Held-out sums of the trainer's current weights over all `parts`."""
    began = time.monotonic()
    nats, tokens, text_bytes, unigram_nats = 0.0, 0, 0.0, 0.0
    for part in parts:
        part_nats, part_tokens = trainer.evaluate(part.sequences, batch_size)
        nats += part_nats
        tokens += part_tokens
        text_bytes += part_tokens * part.bytes_per_token
        unigram_nats += part_tokens * part.unigram_loss
    return EvaluationReport(
        nats=nats,
        tokens=tokens,
        text_bytes=text_bytes,
        unigram_nats=unigram_nats,
        seconds=time.monotonic() - began,
    )


class Node:
    """One owner's training site. Virtual nodes of one device share `trainer`; nothing else is shared."""

    def __init__(
        self, run: str, site: Site, trainer: Trainer, node: NodeConfig, link: LinkConfig, evaluation_batch_size: int
    ) -> None:
        self.run, self.site, self.trainer = run, site, trainer
        self.config, self.link, self.evaluation_batch_size = node, link, evaluation_batch_size

    def handle(self, data: bytes, on_progress: Callable[[NodeProgress], None]) -> bytes:
        """Answer a serialised task. Raises WireError if it is not one for this node and run."""
        received = time.monotonic()
        message = decode_message(data)
        task = expect_task(message)
        if task.node != self.site.name or task.run != self.run:
            raise WireError(
                f"task for node {task.node!r} of run {task.run!r} reached {self.site.name!r} of {self.run!r}"
            )
        if sha256_hex(message.body) != task.base_sha256:
            raise WireError(f"round {task.round}: the base received is not the one the task names (sha256 differs)")
        base = decode_tensors(message.body)
        load_weights(self.trainer.model, base)
        evaluation = None
        if task.evaluate:
            on_progress(NodeProgress(node=task.node, round=task.round, state="evaluating"))
            evaluation = score(self.trainer, self.site.heldout, self.evaluation_batch_size)
        if task.tau == 0:
            return self._reply(task, None, evaluation, b"")
        training, body = self._train(task, base, received + task.deadline_s, on_progress)
        return self._reply(task, training, evaluation, body)

    def _train(
        self, task: Task, base: dict[str, Tensor], deadline: float, on_progress: Callable[[NodeProgress], None]
    ) -> tuple[TrainingReport, bytes]:
        """tau local steps from the base on this node's own stream; commit own state; give the update."""
        state = self.site.store.load(self.run, self.site.name, task.round)
        keep = self.config.optimizer_state == "keep"
        import_state(self.trainer.optimizer, self.trainer.model, state.optimizer if keep else {})
        state = replace(state, optimizer={})  # as read from disk it is a second copy, not to be kept while training

        def on_step(step: int, loss: float) -> bool:
            on_progress(
                NodeProgress(node=task.node, round=task.round, state="training", step=step, steps=task.tau, loss=loss)
            )
            return time.monotonic() < deadline  # late: hand in what there is, weighted by its tokens

        local = self.trainer.train(
            self.site.stream, state.position, self.site.batch_size, task.tau, task.sequential_step, on_step
        )
        after = replace(
            state,
            position=state.position + local.steps * self.site.batch_size,
            tokens=state.tokens + local.tokens,
            steps=state.steps + local.steps,
            optimizer=state_views(self.trainer.optimizer, self.trainer.model) if keep else {},
        )
        report = TrainingReport(
            tokens=local.tokens,
            steps=local.steps,
            loss_first=local.loss_first,
            loss_last=local.loss_last,
            loss_mean=local.loss_mean,
            gradient_norm_mean=local.gradient_norm_mean,
            clipped_steps=local.clipped_steps,
            learning_rate=local.learning_rate_last,
            seconds=local.seconds,
            epoch=self.site.stream.epoch(after.position),
        )
        body = encode_tensors(self._update(base))
        # Committed before it is handed in: an Aggregator that counts this update must find the node ready for the next
        # round. If the update is lost instead, the round is asked for again and starts from the state before.
        self.site.store.commit(after, task.round + 1)
        on_progress(NodeProgress(node=task.node, round=task.round, state="sending", step=local.steps, steps=task.tau))
        return report, body

    @torch.no_grad()
    def _update(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pseudo-gradient `base - local`, clipped and encoded, computed in the place of the model's weights."""
        update = {}
        for name, local in named_weights(self.trainer.model).items():
            update[name] = torch.sub(base[name].to(local.device), local, out=local)
        if self.link.max_update_norm is not None:
            norm = float(torch.stack([delta.double().square().sum() for delta in update.values()]).sum().sqrt())
            if norm > self.link.max_update_norm:
                for delta in update.values():
                    delta.mul_(self.link.max_update_norm / norm)
        codec = CODECS[self.link.up]
        return {name: codec.encode(delta).cpu() for name, delta in update.items()}

    def _reply(
        self, task: Task, training: TrainingReport | None, evaluation: EvaluationReport | None, body: bytes
    ) -> bytes:
        header = Reply(
            run=task.run,
            round=task.round,
            node=task.node,
            nonce=task.nonce,
            base_sha256=task.base_sha256,
            status="ok",
            codec=self.link.up,
            body_sha256=sha256_hex(body),
            training=training,
            evaluation=evaluation,
        )
        return encode_message(header, body)


def failure_reply(data: bytes, node: str, error: str) -> bytes:
    """The answer of a node that cannot do a task; `data` is the task. Raises WireError if even that is unreadable."""
    task = expect_task(decode_message(data))
    return encode_message(
        Reply(
            run=task.run,
            round=task.round,
            node=node,
            nonce=task.nonce,
            base_sha256=task.base_sha256,
            status="failed",
            error=error[:2000],
        )
    )
