"""LLM Node: answers one task at a time, serialised messages both ways.

Between tasks everything it knows is on its disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from photon.config import Recipe
from photon.data.stream import Stream
from photon.errors import PhotonError, WireError
from photon.events import NodeProgress
from photon.link.body import Body, FileBody
from photon.link.codec.feedback import Sent, encode_update, limit_norm, tensor_seed
from photon.link.codec.notation import parse_pipeline
from photon.link.tensors import encode_tensors, sha256_hex, tensor_chunks
from photon.link.update import (
    EMPTY_SHA256,
    EvaluationReport,
    Reply,
    Sealed,
    Serialised,
    Task,
    TrainingReport,
    decode_message,
    expect_task,
    seal,
)
from photon.model.build import load_weights, named_weights
from photon.node.base import Bases, LacksBaseError
from photon.node.heldout import HeldOut, score
from photon.node.optimizers import import_state, state_views
from photon.node.replies import ReplyStore
from photon.node.shared import as_shared, shared_state, whole, with_shared_state
from photon.node.state import NodeState, NodeStore
from photon.node.trainer import LocalRun, Trainer
from photon.parts.base import UPDATE, Moment
from photon.parts.method import STATE_MARK, Method, is_state
from photon.stopwatch import Stopwatch

Order = Literal["go", "hand in", "drop"]
OnUpdate = Callable[[FileBody, str], None]


class TaskDroppedError(PhotonError):
    """Training stopped because its task is not wanted any more; the node's state is that from before it."""


@dataclass(frozen=True)
class Site:
    """What belongs to one owner and stays there."""

    name: str
    batch_size: int
    stream: Stream
    heldout: Sequence[HeldOut]
    store: NodeStore
    replies: ReplyStore | None = None  # where a site keeps its last reply; virtual nodes keep none


@dataclass(frozen=True)
class _Outcome:
    """What local training led to, committed and ready to be handed in."""

    training: TrainingReport
    body: Body
    body_sha256: str


@dataclass(frozen=True)
class _Start:
    """What local training began from, and what of it the node will remember (`Part.remembers`): `remembered`, and if
    `keeps_update` its update."""

    weights: Mapping[str, Tensor]
    remembered: Mapping[str, Tensor] = field(default_factory=dict)
    keeps_update: bool = False


class Node:
    """One owner's training site. Virtual nodes of one device share `trainer`; nothing else is shared.

    `order` is looked at after each step: on "hand in" training stops there and what was done is handed in; on "drop"
    nobody wants the work any more, and it is as if it had never begun.
    """

    def __init__(
        self,
        run: str,
        site: Site,
        trainer: Trainer,
        recipe: Recipe,
        bases: Bases,
        order: Callable[[], Order] = lambda: "go",
    ) -> None:
        self.run, self.site, self.trainer, self.bases, self.order = run, site, trainer, bases, order
        self.config, self.link, self.evaluation_batch_size = recipe.node, recipe.link, recipe.evaluation.batch_size
        self.seed = recipe.seed  # not the run: the same recipe gives the same model each time
        self.codec = parse_pipeline(self.link.up, "link.up", self.link.exact_tensors)
        self.method, self.federation = Method.of(recipe), recipe.federation

    def handle(
        self, data: Serialised, on_progress: Callable[[NodeProgress], None], on_update: OnUpdate | None = None
    ) -> Sealed:
        """Answer a serialised task. Raises WireError if it is not one for this node and run.

        `on_update` is told where the update lies, and its sha256, as soon as it is durable: it can be sent while the
        node's own state is saved. It counts with the reply, not before.
        """
        received, watch = time.monotonic(), Stopwatch()
        message = decode_message(data)
        task = expect_task(message)
        if task.node != self.site.name or task.run != self.run:
            raise WireError(
                f"task for node {task.node!r} of run {task.run!r} reached {self.site.name!r} of {self.run!r}"
            )
        try:
            base = self.bases.receive(task, message.body)
        except LacksBaseError as error:
            return _answer(task, "lacks", str(error))
        stored = self.site.replies.find(task, self.codec.name) if self.site.replies and task.tau else None
        if stored is not None and self._led_to(task.round, stored.position_after):
            print(f"round {task.round}: was trained before; its update is handed in again", flush=True)
            return self._reply(task, _Outcome(stored.training, stored.body, stored.body_sha256), stored.evaluation)
        load_weights(self.trainer.model, base)
        watch.end("receive")
        evaluation = None
        if task.evaluate:
            on_progress(NodeProgress(node=task.node, round=task.round, state="evaluating"))
            evaluation = score(self.trainer, self.site.heldout, self.evaluation_batch_size)
            watch.end("evaluate")
        if task.tau == 0:
            return self._reply(task, None, evaluation)
        outcome = self._train(task, base, evaluation, received + task.deadline_s, on_progress, on_update, watch)
        return self._reply(task, outcome, evaluation)

    def _led_to(self, round_index: int, position: int) -> bool:
        """Whether the state after that round was committed too, with this place in the data."""
        return self.site.store.position_of(round_index + 1) == position

    def _train(
        self,
        task: Task,
        base: dict[str, Tensor],
        evaluation: EvaluationReport | None,
        deadline: float,
        on_progress: Callable[[NodeProgress], None],
        on_update: OnUpdate | None,
        watch: Stopwatch,
    ) -> _Outcome:
        """tau local steps from the base on this node's own stream; commit own state; give the update."""
        # The Aggregator may have gone back to an earlier round: states of a later one belong to what was undone.
        self.site.store.set_aside(task.round + 1)
        state = self.site.store.load(self.run, self.site.name, task.round, self._held)
        start = self._start(task, base, state)
        state = replace(state, optimizer={}, weights={})  # read from disk: a second copy, not to be kept while training
        watch.end("receive")

        def on_step(step: int, loss: float) -> bool:
            on_progress(
                NodeProgress(node=task.node, round=task.round, state="training", step=step, steps=task.tau, loss=loss)
            )
            order = self.order()
            if order == "drop":
                raise TaskDroppedError(f"round {task.round} was dropped after {step} steps; nothing of it is kept")
            return time.monotonic() < deadline and order == "go"  # late: hand in what there is, weighted by its tokens

        # Some Hugging Face models draw numbers in training (the routers of experts): the same for a round done again.
        torch.manual_seed(tensor_seed(f"{self.seed}/{self.site.name}/{task.round}", "train"))
        local = self.trainer.train(
            self.site.stream, state.position, self.site.batch_size, task.tau, task.sequential_step, on_step
        )
        watch.end("train")
        weights = named_weights(self.trainer.model)
        own = (
            {name: weight.to("cpu", copy=True) for name, weight in weights.items()} if self.method.keeps_weights else {}
        )
        update = self._update(start.weights, base, task.round)
        start = replace(start, weights={})  # nor this, while there are two of the update
        if start.keeps_update:
            own |= {**start.remembered, **self._own_update(update)}
        sent = self._encode(update, state.link, task.round)
        watch.end("encode")
        after = replace(
            state,
            link=sent.state,
            position=state.position + local.steps * self.site.batch_size,
            tokens=state.tokens + local.tokens,
            steps=state.steps + local.steps,
            optimizer=state_views(self.trainer.optimizer, self.trainer.model) if self._keeps_optimizer else {},
            weights=own,
        )
        report = _report(local, self.site.stream.epoch(after.position), watch)
        outcome = self._outcome(task, report, evaluation, after.position, sent.wire, on_update)
        # Committed before it is handed in: an Aggregator that counts this update must find the node ready for the next
        # round. If the update is lost instead, the round is asked for again and starts from the state before.
        self.trainer.committed_sha256 = self.site.store.commit(after, task.round + 1)
        on_progress(NodeProgress(node=task.node, round=task.round, state="sending", step=local.steps, steps=task.tau))
        return replace(outcome, training=report.model_copy(update={"save_s": watch.end("save")}))

    @property
    def _keeps_optimizer(self) -> bool:
        return self.config.optimizer_state == "keep"

    @property
    def _held(self) -> str:
        """Which committed optimizer state need not be read again, since it goes on as it lies in the trainer."""
        begins_with_it = self._keeps_optimizer and not (self.method.keeps_weights or self.method.shared_state)
        return self.trainer.committed_sha256 if begins_with_it else ""

    def _start(self, task: Task, base: dict[str, Tensor], state: NodeState) -> _Start:
        """Make model and optimizer what local training starts from: of the base, and where parts say so the node's own.

        The base is in the model already. A node that was not in the round before takes all of the base.
        """
        model, optimizer = self.trainer.model, self.trainer.optimizer
        own = state.optimizer if self._keeps_optimizer else {}
        was_there = state.ready_for == task.round
        if self.method.keeps_weights or self.method.shared_state:
            held = {**own, **state.weights} if was_there else {}
            shapes = _shapes(base)
            taken = set(self.method.taken(shapes, task.round))
            if lacking := {name for name in base if whole(name) not in held}:
                # State that no round has exchanged yet is in the base as it began: the node's own, if any, is better.
                known = self.method.exchanged_before(shapes, task.round)
                taken |= {name for name in lacking if name in known or not is_state(name)}
            start = {name: self._taken(name, held, base) for name in taken}
            load_weights(model, held | start)
            states = set(filter(is_state, base))
            came = {name: start[name] for name in states & start.keys()}
            own = with_shared_state(optimizer, model, own, came, states, task.sequential_step)
        begun = self._ahead(task, base, state.weights if was_there else {})
        if begun.weights is not base:
            load_weights(model, begun.weights)
        if not state.optimizer_is_held:
            self.trainer.committed_sha256 = ""
            import_state(optimizer, model, own)
        self.trainer.correct = self.method.corrector(model, begun.weights)
        return begun

    def _taken(self, name: str, held: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
        own = as_shared(held, name) if whole(name) in held else base[name]
        return self.method.start(name, own, base[name])

    @torch.no_grad()
    def _ahead(self, task: Task, base: dict[str, Tensor], was: Mapping[str, Tensor]) -> _Start:
        """Where parts say so, weights ahead of the base's, by what the node remembers of the round before (`was`)."""
        if not self.method.goes_ahead:
            return _Start(base)
        steps = self.federation.sequential_steps
        moment = Moment(task.round, task.sequential_step, steps, tau=task.tau)  # a node knows of no agreement
        federation = self.method.federation(self.federation, moment)
        kinds = self.method.remembers(federation)
        keeps_update = bool(kinds) and task.sequential_step + federation.tau < steps  # else it is applied at once
        if not kinds or not all(_remembered(name, UPDATE) in was for name in base):
            return _Start(base, {}, keeps_update)
        start, remembered = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in base.items():
            found = {kind: was.get(_remembered(name, kind)) for kind in kinds}
            own = {kind: torch.zeros_like(tensor) if t is None else t.clone() for kind, t in found.items()}
            start[name] = self.method.ahead(tensor, own, federation, task.nodes)
            remembered |= {_remembered(name, kind): value for kind, value in own.items() if kind != UPDATE}
        return _Start(start, remembered, keeps_update)

    def _own_update(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the update as it is remembered: before the codec, but no longer than `link.max_update_norm`."""
        own = {_remembered(name, UPDATE): tensor.to("cpu", copy=True) for name, tensor in update.items()}
        limit_norm(own, self.link.max_update_norm)
        return own

    def _outcome(
        self,
        task: Task,
        report: TrainingReport,
        evaluation: EvaluationReport | None,
        position: int,
        update: dict[str, Tensor],
        on_update: OnUpdate | None,
    ) -> _Outcome:
        if self.site.replies is None:
            body = encode_tensors(update)
            return _Outcome(report, body, sha256_hex(body))
        stored = self.site.replies.commit(task, report, evaluation, self.codec.name, position, tensor_chunks(update))
        if on_update is not None:
            on_update(stored.body, stored.body_sha256)
        return _Outcome(report, stored.body, stored.body_sha256)

    @torch.no_grad()
    def _update(self, start: Mapping[str, Tensor], base: dict[str, Tensor], round_index: int) -> dict[str, Tensor]:
        """The pseudo-gradient `start - local`, computed in the place of the model's weights.

        Of optimizer state that is shared it is `base - local`; that state stays as it is.
        """
        update = named_weights(self.trainer.model)
        if self.link.of == "difference":
            for name, local in update.items():
                torch.sub(start[name].to(local.device), local, out=local)
        if self.method.parts:
            update |= self._state_differences(base)
            update = {name: update[name] for name in self.method.exchanged(_shapes(base), round_index)}
        return update

    @torch.no_grad()
    def _encode(self, update: dict[str, Tensor], state: Mapping[str, Tensor], round_index: int) -> Sent:
        """The update, clipped and encoded; it is emptied on the way."""
        seed = f"{self.seed}/{self.site.name}/{round_index}"
        limit = self.link.max_update_norm if self.link.of == "difference" else None
        return encode_update(
            self.codec, update, state, self.link.up_decay, seed, max_norm=limit, rescale=self.link.up_rescales
        )

    def _state_differences(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        own = shared_state(self.trainer.optimizer, self.trainer.model, filter(is_state, base))
        return {name: torch.sub(base[name].to(tensor.device), tensor) for name, tensor in own.items()}

    def _reply(self, task: Task, outcome: _Outcome | None, evaluation: EvaluationReport | None) -> Sealed:
        body: Body = outcome.body if outcome else b""
        header = Reply(
            run=task.run,
            round=task.round,
            node=task.node,
            nonce=task.nonce,
            base_sha256=task.base_sha256,
            status="ok",
            codec=self.codec.name,
            body_sha256=outcome.body_sha256 if outcome else EMPTY_SHA256,
            training=outcome.training if outcome else None,
            evaluation=evaluation,
        )
        return seal(header, body)


def _remembered(name: str, kind: str) -> str:
    """The name under which a node's state has what it remembers of a weight."""
    return f"{name}{STATE_MARK}{kind}"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _report(local: LocalRun, epoch: float, watch: Stopwatch) -> TrainingReport:
    return TrainingReport(
        tokens=local.tokens,
        steps=local.steps,
        loss_first=local.loss_first,
        loss_last=local.loss_last,
        loss_mean=local.loss_mean,
        gradient_norm_mean=local.gradient_norm_mean,
        clipped_steps=local.clipped_steps,
        learning_rate=local.learning_rate_last,
        seconds=local.seconds,
        epoch=epoch,
        receive_s=watch.seconds["receive"],
        encode_s=watch.seconds["encode"],
    )


def failure_reply(data: Serialised, node: str, error: str) -> Sealed:
    """The answer of a node that cannot do a task; `data` is the task. Raises WireError if even that is unreadable."""
    return _answer(expect_task(decode_message(data)).model_copy(update={"node": node}), "failed", error)


def _answer(task: Task, status: Literal["failed", "lacks"], error: str) -> Sealed:
    return seal(
        Reply(
            run=task.run,
            round=task.round,
            node=task.node,
            nonce=task.nonce,
            base_sha256=task.base_sha256,
            status=status,
            error=error[:2000],
        )
    )
