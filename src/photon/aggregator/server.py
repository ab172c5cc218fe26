"""The round loop. Read `Aggregator.run` and `Aggregator._round` top to bottom; that is a federated training run."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from photon.aggregator.drift import pairwise_cosine, sample_update
from photon.aggregator.exchange import Exchange, Patience
from photon.aggregator.merge import Merge
from photon.aggregator.outer import OuterOptimizer
from photon.aggregator.sampling import sample_nodes
from photon.aggregator.scores import Tally
from photon.aggregator.state import GlobalState, RoundStore
from photon.aggregator.validate import codec_of, evaluation_report, training_report, verify_training
from photon.config import Recipe
from photon.errors import ReplyRefusedError, RoundFailedError, WireError
from photon.events import Evaluated, NodeRound, RoundDone
from photon.fabric.base import Fabric, NodeInfo
from photon.link.ledger import Ledger, Traffic
from photon.link.tensors import decode_tensors, encode_tensors, iterate_tensors, sha256_hex
from photon.link.update import Message, Task, TrainingReport, expect_reply
from photon.track import Tracker


@dataclass
class _Merged:
    """What a round's replies add up to."""

    pseudo_gradient: dict[str, Tensor]
    reports: dict[str, TrainingReport] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


class Aggregator:
    """Holds the global model and runs the rounds over a fabric; knows nodes by name and nothing of their text."""

    def __init__(self, recipe: Recipe, fabric: Fabric, store: RoundStore, tracker: Tracker, state: GlobalState) -> None:
        self.recipe, self.fabric, self.store, self.tracker = recipe, fabric, store, tracker
        self.progress = state.progress
        self.outer = OuterOptimizer(decode_tensors(state.payload), recipe.federation)
        self.outer.import_state(state.outer)
        self.payload, self.model_sha256 = state.payload, state.model_sha256
        self.ledger = Ledger(total=Traffic(state.progress.bytes_down, state.progress.bytes_up))
        self._clock_zero = time.monotonic() - state.progress.seconds
        self._commit_s = 0.0

    def run(self) -> GlobalState:
        """All rounds that are left. Each is a transaction: committed whole or, after a crash, done again."""
        if not self.store.rounds():  # the first committed state is the untrained model and its scores
            self.evaluate()
            self.commit()
        while self.progress.round < self.recipe.federation.rounds:
            self._round()
            self.commit()
        return self.state()

    def _round(self) -> None:
        federation, began = self.recipe.federation, time.monotonic()
        self.ledger.begin_round()

        # 1. Sample nodes, send each the base, fold the replies as they come.
        merged = self._gather(self._sample())
        nodes_s = time.monotonic() - began

        # 2. The outer optimizer descends along the merged pseudo-gradient.
        stepping = time.monotonic()
        before = {name: tensor.clone() for name, tensor in self.outer.weights().items()}
        self.outer.step(merged.pseudo_gradient)
        outer_norm = _norm({name: before[name] - tensor for name, tensor in self.outer.weights().items()})
        self.payload = encode_tensors(self.outer.weights())
        self.model_sha256 = sha256_hex(self.payload)
        round_tokens = sum(report.tokens for report in merged.reports.values())
        self.progress = self.progress.after_round((self.progress.round + 1) * federation.tau, round_tokens)
        outer_s = time.monotonic() - stepping

        # 3. Every owner scores the new model on its held-out text.
        evaluating = time.monotonic()
        round_traffic = self.ledger.round
        due = self.progress.round % self.recipe.evaluation.every == 0 or self.progress.round == federation.rounds
        training_nodes = {node: replace(self.ledger.of(node)) for node in merged.reports}
        evaluation = self._evaluate() if due else None
        phases_s = {
            "nodes": nodes_s,
            "outer": outer_s,
            "evaluate": time.monotonic() - evaluating,
            "commit": self._commit_s,  # of the round before: this one's is not over when its line is written
        }
        self.tracker.write(self._round_event(merged, round_traffic, training_nodes, outer_norm, phases_s))
        if evaluation is not None:
            self.tracker.write(evaluation)

    def _sample(self) -> list[NodeInfo]:
        trainers = {info.name: info for info in self.fabric.nodes() if info.trains}
        names = sample_nodes(self.recipe.seed, self.progress.round, list(trainers), self.recipe.nodes_per_round)
        if not names:
            raise RoundFailedError(f"round {self.progress.round}: no node is connected; nothing was lost, resume later")
        return [trainers[name] for name in names]

    def _gather(self, nodes: list[NodeInfo]) -> _Merged:
        """Train on `nodes` and merge. Raises RoundFailedError if fewer than the quorum can be used."""
        taus = {silo.name: self.recipe.tau_of(silo) for silo in self.recipe.silo}
        tasks = {
            info.name: self._task(info.name, "train", taus.get(info.name, self.recipe.federation.tau)) for info in nodes
        }
        limits = {info.name: info.tokens_per_step for info in nodes}
        uniform = self.recipe.federation.weighting == "uniform"
        base = self.outer.weights()
        total_values = sum(tensor.numel() for tensor in base.values())
        most = len(nodes) if uniform else sum(tasks[name].tau * limits[name] for name in tasks)
        merge = Merge(base, most)
        merged = _Merged({})
        exchange = self._exchange()
        exchange.send(tasks, self.payload)
        for task, message in exchange.replies():
            try:
                norm = verify_training(message, task, limits[task.node], base)
            except (ReplyRefusedError, WireError) as error:
                exchange.refuse(task.node, str(error))
                continue
            report = training_report(expect_reply(message))
            merge.fold(_update(message, base), 1 if uniform else report.tokens)
            merged.reports[task.node], merged.norms[task.node] = report, norm
            merged.samples[task.node] = sample_update(_update(message, base), total_values)
        merged.missing = exchange.missing
        if not exchange.quorum_is_met:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in sorted(exchange.missing.items()))
            raise RoundFailedError(
                f"round {self.progress.round}: {len(merged.reports)} of {len(tasks)} nodes counted, "
                f"federation.quorum asks for {math.ceil(self.recipe.federation.quorum * len(tasks))}. {reasons}. "
                "The rounds before are safe: mend the nodes and resume."
            )
        merged.pseudo_gradient = merge.result()
        return merged

    def evaluate(self) -> None:
        """Score the current global model at every owner and record it."""
        event = self._evaluate()
        if event is not None:
            self.tracker.write(event)

    def _evaluate(self) -> Evaluated | None:
        owners = [info.name for info in self.fabric.nodes() if info.evaluates]
        tasks = {name: self._task(name, "evaluate", 0) for name in owners}
        exchange = self._exchange()
        exchange.send(tasks, self.payload)
        tally = Tally()
        for task, message in exchange.replies():
            try:
                tally.add(task.node, evaluation_report(expect_reply(message)))
            except ReplyRefusedError as error:
                exchange.refuse(task.node, str(error))
        if exchange.missing:
            self.tracker.note(f"no held-out score from {', '.join(sorted(exchange.missing))}: {exchange.missing}")
        if tally.is_empty:
            return None
        return Evaluated(
            time=time.time(),
            seconds=self._seconds(),
            round=self.progress.round,
            sequential_step=self.progress.sequential_step,
            tokens=self.progress.tokens,
            bytes_up=self.ledger.total.bytes_up,
            bytes_down=self.ledger.total.bytes_down,
            pooled=tally.pooled(),
            silos=tally.silos(),
        )

    def commit(self) -> None:
        """Make the current state durable: after this a crash loses nothing up to here."""
        began = time.monotonic()
        self.progress = replace(
            self.progress,
            bytes_up=self.ledger.total.bytes_up,
            bytes_down=self.ledger.total.bytes_down,
            seconds=self._seconds(),
            metrics_bytes=self.tracker.sync(),
        )
        self.store.commit(self.state())
        self._commit_s = time.monotonic() - began

    def state(self) -> GlobalState:
        """The state as it would be committed now."""
        return GlobalState(self.progress, self.payload, self.outer.export_state())

    def _task(self, node: str, work: str, tau: int) -> Task:
        return Task(
            run=self.progress.run,
            round=self.progress.round,
            node=node,
            nonce=secrets.token_hex(8),
            base_sha256=self.model_sha256,
            work="train" if work == "train" else "evaluate",
            sequential_step=self.progress.sequential_step,
            tau=tau,
            deadline_s=self.recipe.federation.deadline_s,
        )

    def _exchange(self) -> Exchange:
        federation = self.recipe.federation
        patience = Patience(federation.quorum, federation.grace_s, federation.deadline_s)
        return Exchange(self.fabric, self.ledger, patience, self.tracker.progress)

    def _seconds(self) -> float:
        return time.monotonic() - self._clock_zero

    def _round_event(
        self,
        merged: _Merged,
        traffic: Traffic,
        node_traffic: Mapping[str, Traffic],
        outer_norm: float,
        phases_s: dict[str, float],
    ) -> RoundDone:
        reports = merged.reports
        tokens = sum(report.tokens for report in reports.values())
        return RoundDone(
            time=time.time(),
            seconds=self._seconds(),
            round=self.progress.round,
            sequential_step=self.progress.sequential_step,
            tokens=self.progress.tokens,
            round_tokens=tokens,
            tokens_per_second=tokens / max(sum(phases_s.values()), 1e-9),
            bytes_up=self.ledger.total.bytes_up,
            bytes_down=self.ledger.total.bytes_down,
            round_bytes_up=traffic.bytes_up,
            round_bytes_down=traffic.bytes_down,
            train_loss=sum(reports[name].loss_mean * reports[name].tokens for name in sorted(reports)) / tokens,
            learning_rate=max(report.learning_rate for report in reports.values()),
            merged_norm=_norm(merged.pseudo_gradient),
            outer_norm=outer_norm,
            nodes={
                name: _node_round(reports[name], merged.norms[name], node_traffic[name]) for name in sorted(reports)
            },
            missing=dict(sorted(merged.missing.items())),
            cosine=pairwise_cosine(merged.samples),
            phases_s=phases_s,
        )


def _update(message: Message, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The update of a verified reply, decoded one tensor at a time."""
    codec = codec_of(expect_reply(message))
    for name, wire in iterate_tensors(message.body):
        yield name, codec.decode(name, wire, base[name])


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def _node_round(report: TrainingReport, update_norm: float, traffic: Traffic) -> NodeRound:
    return NodeRound(
        tokens=report.tokens,
        steps=report.steps,
        loss_first=report.loss_first,
        loss_last=report.loss_last,
        loss_mean=report.loss_mean,
        gradient_norm_mean=report.gradient_norm_mean,
        clipped_steps=report.clipped_steps,
        update_norm=update_norm,
        seconds=report.seconds,
        tokens_per_second=report.tokens / max(report.seconds, 1e-9),
        epoch=report.epoch,
        bytes_up=traffic.bytes_up,
        bytes_down=traffic.bytes_down,
    )
