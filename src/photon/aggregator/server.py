"""The round loop. Read `Aggregator.run` and `Aggregator._round` top to bottom; that is a federated training run."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from photon.aggregator.assemble import RollCall, assemble
from photon.aggregator.balance import local_steps, measured
from photon.aggregator.drift import pairwise_cosine, sample_update
from photon.aggregator.exchange import Exchange, Patience, quorum_of
from photon.aggregator.merge import Merge
from photon.aggregator.norms import NormBound, norm_of, remember
from photon.aggregator.outer import OuterOptimizer
from photon.aggregator.sampling import sample_with_spares
from photon.aggregator.scores import Tally
from photon.aggregator.state import GlobalState, RoundStore
from photon.aggregator.trust import Trust
from photon.aggregator.validate import codec_of, evaluation_report, training_report, verify_norm, verify_training
from photon.config import Recipe
from photon.errors import ReplyRefusedError, RoundFailedError, WireError
from photon.events import Evaluated, NodeRound, RoundDone
from photon.fabric.base import Fabric, NodeInfo
from photon.link.body import Body
from photon.link.ledger import Ledger, Traffic
from photon.link.tensors import decode_tensors, encode_tensors, iterate_tensors, sha256_hex
from photon.link.update import Message, Task, TrainingReport, expect_reply
from photon.track import Tracker


@dataclass
class _Merged:
    """What a round's replies add up to."""

    pseudo_gradient: dict[str, Tensor] = field(default_factory=dict)
    reports: dict[str, TrainingReport] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, tuple[float, int]] = field(default_factory=dict)  # as the norm history keeps them
    tally: Tally = field(default_factory=Tally)


class Aggregator:
    """Holds the global model and runs the rounds over a fabric; knows nodes by name and nothing of their text.

    `operator` is the folder where a person leaves readmissions (see `Trust`); None: there is nobody to do so.
    """

    def __init__(
        self,
        recipe: Recipe,
        fabric: Fabric,
        store: RoundStore,
        tracker: Tracker,
        state: GlobalState,
        operator: Path | None = None,
    ) -> None:
        self.recipe, self.fabric, self.store, self.tracker = recipe, fabric, store, tracker
        self.progress = state.progress
        self.outer = OuterOptimizer(decode_tensors(state.payload), recipe.federation)
        self.outer.import_state(state.outer)
        self.payload: Body = state.payload
        self.model_sha256 = state.model_sha256
        self.trust = Trust(state.progress.charges, recipe.federation.suspend_after, operator, tracker.note)
        self.ledger = Ledger(total=Traffic(state.progress.bytes_down, state.progress.bytes_up))
        self._clock_zero = time.monotonic() - state.progress.seconds
        self._commit_s = 0.0
        self._absent: frozenset[str] = frozenset()  # trainers that the last round began without

    def run(self) -> GlobalState:
        """All rounds that are left. Each is a transaction: committed whole or, after a crash, done again."""
        self.trust.announce()
        if not self.store.rounds():
            self._commit()  # round 0: the untrained model
        while self.progress.round < self.recipe.federation.rounds:
            self._round()
            if self.progress.round == self.recipe.federation.rounds:
                self._final_evaluation()
            self._commit()
        return self.state()

    def _round(self) -> None:
        began = time.monotonic()
        self.ledger.begin_round()

        # 1. See who is there. Whom an operator has readmitted belongs to the run again; who is absent is waited for.
        self.trust.readmit()
        present = self._assemble()
        assembly_s = time.monotonic() - began

        # 2. Sample nodes. Each gets the base, scores it on its held-out text if that is due, trains tau local steps
        #    and replies with a pseudo-gradient, which is verified and folded into the merge as it arrives.
        merged = self._gather(self._sample(present), present)
        if not merged.tally.is_empty:
            self.tracker.write(self._evaluated(merged.tally))
        nodes_s = time.monotonic() - began - assembly_s

        # 3. The outer optimizer descends along the merged pseudo-gradient.
        stepping = time.monotonic()
        self.outer.step(merged.pseudo_gradient)
        outer_norm = _distance(self.payload, self.outer.weights())
        self.payload = encode_tensors(self.outer.weights())
        self.model_sha256 = sha256_hex(self.payload)
        tokens = sum(report.tokens for report in merged.reports.values())
        self.progress = self.progress.after_round((self.progress.round + 1) * self.recipe.federation.tau, tokens)

        # 4. Remember how nodes behaved and say what happened; `run` commits. (This round's commit is not over when its
        #    line is written.)
        self._remember(merged)
        outer_s = time.monotonic() - stepping
        phases_s = {
            "assembly": assembly_s,
            "nodes": nodes_s,
            "outer": outer_s,
            "commit of the round before": self._commit_s,
        }
        self.tracker.write(self._round_event(merged, outer_norm, phases_s))

    @property
    def _nodes_per_round(self) -> int:
        """K; the baseline has one node that trains."""
        return 1 if self.recipe.federation.outer == "none" else self.recipe.nodes_per_round

    def _assemble(self) -> list[NodeInfo]:
        quorum = quorum_of(self.recipe.federation.quorum, self._nodes_per_round)
        call = RollCall.of(self.recipe, self.progress.round, self.trust.suspended, quorum, self._absent)
        present = assemble(self.fabric, self.ledger, self.tracker, call)
        self._absent = frozenset(call.missing({info.name for info in present if info.trains}))
        return present

    def _sample(self, present: list[NodeInfo]) -> list[NodeInfo]:
        trainers = {info.name: info for info in present if info.trains}
        seed, oversample = self.recipe.seed, self.recipe.federation.oversample
        names = sample_with_spares(seed, self.progress.round, list(trainers), self._nodes_per_round, oversample)
        return [trainers[name] for name in names]

    def _gather(self, nodes: list[NodeInfo], present: list[NodeInfo]) -> _Merged:
        """Train on `nodes` and merge. Raises RoundFailedError if fewer than the quorum can be used."""
        tasks = self._tasks(nodes, present)
        limits = {info.name: info.tokens_per_step for info in nodes}
        heldout_limits = {info.name: info.evaluation_tokens for info in present}
        uniform = self.recipe.federation.weighting == "uniform"
        base = self.outer.weights()
        bound = NormBound(self.progress.norms, base, self.progress.sequential_step, self.recipe.node.warmup_steps)
        merge = Merge(base, len(nodes) if uniform else sum(tasks[name].tau * limits[name] for name in limits))
        merged = _Merged()
        exchange = self._exchange(self._nodes_per_round)
        exchange.send(tasks, self.payload)
        for task, message in exchange.replies():
            reply, node = expect_reply(message), task.node
            try:  # all of a reply is checked before any of it counts
                scores = evaluation_report(reply, heldout_limits[node]) if task.evaluate else None
                if task.tau > 0:
                    norm = verify_training(message, task, limits[node], base)
                    verify_norm(norm, self.recipe.link.max_update_norm)
                    report = training_report(reply)
                    if self._bounds_norms:
                        bound.verify(norm, report.steps)
            except (ReplyRefusedError, WireError) as error:
                exchange.refuse(node, str(error))
                continue
            if scores is not None:
                merged.tally.add(node, scores)
            if task.tau == 0:
                continue
            merge.fold(_update(message, base), 1 if uniform else report.tokens)
            merged.reports[node], merged.norms[node] = report, norm
            merged.accepted[node] = bound.entry(norm, report.steps)
            merged.samples[node] = sample_update(_update(message, base), _values(base))
            del message, reply  # freed before the next one arrives, not after
        merged.missing, merged.refused = exchange.missing, exchange.refused
        if not exchange.quorum_is_met:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in sorted(exchange.missing.items()))
            raise RoundFailedError(
                f"round {self.progress.round}: {len(merged.reports)} of {len(nodes)} nodes counted, "
                f"federation.quorum asks for {exchange.quorum}. {reasons}. "
                "The rounds before are safe: mend the nodes and resume."
            )
        merged.pseudo_gradient = merge.result()
        return merged

    @property
    def _bounds_norms(self) -> bool:
        """The baseline's only node has nobody to differ from, and whoever runs it owns it."""
        return self.recipe.federation.norm_bound and self.recipe.federation.outer != "none"

    def _taus(self, nodes: list[NodeInfo]) -> dict[str, int]:
        """Local steps of each sampled node: its silo's own tau, else by its speed if that is asked for, else tau."""
        federation = self.recipe.federation
        own = {silo.name: silo.tau for silo in self.recipe.silo if silo.tau is not None}
        others = [info.name for info in nodes if info.name not in own]
        speeds = self.progress.seconds_per_step if federation.balance == "time" else {}
        return own | local_steps(others, federation.tau, speeds)

    def _tasks(self, nodes: list[NodeInfo], present: list[NodeInfo]) -> dict[str, Task]:
        """A train task for each sampled node; where scores are due, also an evaluate task for every other owner."""
        taus = self._taus(nodes)
        due = self.progress.round % self.recipe.evaluation.every == 0
        tasks = {info.name: self._task(info.name, taus[info.name], due and info.evaluates) for info in nodes}
        others = [info.name for info in present if info.evaluates and info.name not in tasks] if due else []
        return tasks | {name: self._task(name, 0, evaluate=True) for name in others}

    def _remember(self, merged: _Merged) -> None:
        """What later rounds judge nodes by; committed with this one."""
        self.trust.charge(self.progress.round - 1, merged.refused)
        self.progress = replace(
            self.progress,
            norms=remember(self.progress.norms, [merged.accepted[name] for name in sorted(merged.accepted)]),
            seconds_per_step=measured(self.progress.seconds_per_step, merged.reports),
        )

    def _final_evaluation(self) -> None:
        """Score the finished model at every owner: no round follows that would do it on the way."""
        exchange = self._exchange()
        owners = [info for info in self.fabric.nodes() if info.evaluates and info.name not in self.trust.suspended]
        limits = {info.name: info.evaluation_tokens for info in owners}
        exchange.send({name: self._task(name, 0, evaluate=True) for name in limits}, self.payload)
        tally = Tally()
        for task, message in exchange.replies():
            try:
                tally.add(task.node, evaluation_report(expect_reply(message), limits[task.node]))
            except ReplyRefusedError as error:
                exchange.refuse(task.node, str(error))
        self.trust.charge(self.progress.round, exchange.refused)
        if exchange.missing:
            self.tracker.note(f"the final score lacks {', '.join(sorted(exchange.missing))}: {exchange.missing}")
        if not tally.is_empty:
            self.progress = replace(
                self.progress,
                bytes_up=self.ledger.total.bytes_up,
                bytes_down=self.ledger.total.bytes_down,
                seconds=self._seconds(),
            )
            self.tracker.write(self._evaluated(tally))

    def _evaluated(self, tally: Tally) -> Evaluated:
        """Scores of the base, beside what that base had cost when it was committed."""
        return Evaluated(
            time=time.time(),
            seconds=self.progress.seconds,
            round=self.progress.round,
            sequential_step=self.progress.sequential_step,
            tokens=self.progress.tokens,
            bytes_up=self.progress.bytes_up,
            bytes_down=self.progress.bytes_down,
            pooled=tally.pooled(),
            silos=tally.silos(),
        )

    def _commit(self) -> None:
        """Make the current state durable: after this a crash loses nothing up to here."""
        began = time.monotonic()
        self.progress = replace(
            self.progress,
            bytes_up=self.ledger.total.bytes_up,
            bytes_down=self.ledger.total.bytes_down,
            seconds=self._seconds(),
            metrics_bytes=self.tracker.sync(),
            charges=dict(self.trust.charges),
        )
        self.store.commit(self.state())
        # From here on the model as it travels is read from its file: one model less in memory while nodes work.
        self.payload = self.store.model_file(self.progress.round)
        self.trust.committed()
        self._commit_s = time.monotonic() - began

    def state(self) -> GlobalState:
        """The state as it would be committed now."""
        return GlobalState(self.progress, self.payload, self.outer.export_state())

    def _task(self, node: str, tau: int, evaluate: bool) -> Task:
        return Task(
            run=self.progress.run,
            round=self.progress.round,
            node=node,
            nonce=secrets.token_hex(8),
            base_sha256=self.model_sha256,
            evaluate=evaluate,
            sequential_step=self.progress.sequential_step,
            tau=tau,
            deadline_s=self.recipe.federation.deadline_s,
        )

    def _exchange(self, nodes: int | None = None) -> Exchange:
        federation = self.recipe.federation
        patience = Patience(federation.quorum, federation.grace_s, federation.deadline_s, nodes)
        return Exchange(self.fabric, self.ledger, patience, self.tracker.progress)

    def _seconds(self) -> float:
        return time.monotonic() - self._clock_zero

    def _round_event(self, merged: _Merged, outer_norm: float, phases_s: dict[str, float]) -> RoundDone:
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
            round_bytes_up=self.ledger.round.bytes_up,
            round_bytes_down=self.ledger.round.bytes_down,
            train_loss=sum(reports[name].loss_mean * reports[name].tokens for name in sorted(reports)) / tokens,
            learning_rate=max(report.learning_rate for report in reports.values()),
            merged_norm=norm_of(merged.pseudo_gradient),
            outer_norm=outer_norm,
            nodes={
                name: _node_round(reports[name], merged.norms[name], self.ledger.of(name), merged.tally.seconds(name))
                for name in sorted(reports)
            },
            missing=dict(sorted(merged.missing.items())),
            suspended=self.trust.suspended,
            cosine=pairwise_cosine(merged.samples),
            phases_s=phases_s,
        )


def _update(message: Message, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The update of a verified reply, decoded one tensor at a time."""
    codec = codec_of(expect_reply(message))
    for name, wire in iterate_tensors(message.body):
        yield name, codec.decode(name, wire, base[name])


def _distance(payload: Body, weights: Mapping[str, Tensor]) -> float:
    """L2 norm of what the outer step changed, one tensor at a time; the old weights are still there as sent."""
    return math.sqrt(
        sum(float((old - weights[name]).double().square().sum()) for name, old in iterate_tensors(payload))
    )


def _values(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _node_round(report: TrainingReport, update_norm: float, traffic: Traffic, evaluation_seconds: float) -> NodeRound:
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
        evaluation_seconds=evaluation_seconds,
        tokens_per_second=report.tokens / max(report.seconds, 1e-9),
        epoch=report.epoch,
        bytes_up=traffic.bytes_up,
        bytes_down=traffic.bytes_down,
    )
