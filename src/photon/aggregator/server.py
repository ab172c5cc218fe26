"""The round loop. Read `Aggregator.run` and `Aggregator._round` top to bottom; that is a federated training run."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from torch import Tensor

from photon.aggregator.allocator import return_freed_memory
from photon.aggregator.assemble import RollCall, assemble
from photon.aggregator.balance import measured
from photon.aggregator.downlink import Downlink, Told, telling
from photon.aggregator.drift import mean_cosine, sample_update
from photon.aggregator.early import Present, foresee
from photon.aggregator.exchange import Exchange, Patience, RawBytes, quorum_of
from photon.aggregator.gathered import Gathered
from photon.aggregator.late import UNIFORM_WEIGHT, Late
from photon.aggregator.merge import Merge
from photon.aggregator.norms import NormBound, remember, same_turns
from photon.aggregator.outer import OuterOptimizer
from photon.aggregator.record import Merged, round_event
from photon.aggregator.sampling import Draw, draw_round
from photon.aggregator.scores import Tally
from photon.aggregator.state import GlobalState, RoundStore
from photon.aggregator.tasks import RoundTasks
from photon.aggregator.trust import Trust
from photon.aggregator.updates import UpdateReader
from photon.aggregator.validate import evaluation_report, training_report, verify_norm, verify_training
from photon.config import Recipe
from photon.errors import ReplyRefusedError, RoundFailedError, StateError, WireError
from photon.events import Evaluated
from photon.fabric.base import Fabric, NodeInfo
from photon.link.body import Body
from photon.link.ledger import Flow, Ledger, Traffic
from photon.link.tensors import decode_tensors, streamed_chunks, tensor_chunks
from photon.link.update import Task, expect_reply, seal
from photon.parts.base import Moment
from photon.parts.method import Method
from photon.stopwatch import Stopwatch
from photon.track import Tracker

_ACCOUNTS_S = 1.5  # the gateway's accounts are at most so old


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
        return_freed_memory()  # before the first tensor of many
        self.recipe, self.fabric, self.store, self.tracker = recipe, fabric, store, tracker
        self.progress = state.progress
        self.method, self.late = Method.of(recipe), Late()
        self.outer = OuterOptimizer(Downlink.exact_weights(state.downlink, state.payload), recipe.federation)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.outer.weights().items()}
        self._follow_method()
        self.outer.import_state(state.outer)
        self.downlink = Downlink(recipe.link, state.downlink, state.progress.holders, self.method.is_partial)
        self.downlink.restore(state.message, state.progress)
        self.reader = UpdateReader.of(recipe.link)
        self.payload: Body = state.payload
        self.model_sha256 = state.model_sha256
        self.trust = Trust(state.progress.charges, recipe.federation.suspend_after, operator, tracker.note)
        self.ledger = Ledger(total=state.progress.link, counts_sent=fabric.carried() is not None)
        if store.rounds():  # what the network carried of rounds that were not committed is on no ledger
            self.ledger.skip(fabric.carried() or {})
        self._clock_zero, self._commit_s = time.monotonic() - state.progress.seconds, 0.0
        self._absent: frozenset[str] = frozenset()  # trainers that the last round began without

    def run(self) -> GlobalState:
        """All rounds that are left. Each is a transaction: committed whole or, after a crash, done again."""
        self.trust.announce()
        if not self.store.rounds():
            self._commit()  # round 0: the untrained model
        while not self._is_over():
            self._round()
            if self._is_over():
                self._final_evaluation()
            self._commit()
        return self.state()

    def _is_over(self) -> bool:
        return self.progress.sequential_step >= self.recipe.federation.sequential_steps

    def _follow_method(self) -> None:
        """What the method makes of the round that begins: its options, and the tensors that it exchanges."""
        progress, steps = self.progress, self.recipe.federation.sequential_steps
        moment = Moment(progress.round, progress.sequential_step, steps, progress.agreement, progress.tau)
        self.federation = self.method.federation(self.recipe.federation, moment)
        self.exchanged = self.method.exchanged(self._shapes, progress.round)
        is_last = progress.sequential_step + self.federation.tau >= steps
        self.late.begin(progress.round, 0 if is_last else self.method.late_rounds)
        self.moved = self.method.moved(self._shapes, progress.round, is_last)
        holds_back = self.method.holds_back and not is_last
        self.outer.follow(self.federation, self.exchanged, self.method.averages(moment), holds_back)

    def _round(self) -> None:
        began = time.monotonic()
        self.ledger.begin_round()
        self._follow_method()

        # 1. See who is there. Whom an operator has readmitted belongs to the run again; who is absent is waited for.
        self.trust.readmit()
        present = self._assemble()
        assembly_s = time.monotonic() - began

        # 2. Sample nodes. Each gets the base, scores it on its held-out text if that is due, trains tau local steps
        #    and replies with a pseudo-gradient, which is verified and folded into the merge as it arrives.
        merged = self._gather(self._sample(present), present)
        if not merged.tally.is_empty:
            self.tracker.write(self._evaluated(merged.tally))
        nodes_s = time.monotonic() - began - assembly_s - merged.merge_s

        # 3. The outer optimizer descends along the merged pseudo-gradient, of some methods along that of the round
        #    before. What nodes can rebuild of the result, from what the downlink sends them, is the next base.
        stepping, folding_s = time.monotonic(), merged.merge_s
        stepped = self.outer.step(merged.pseudo_gradient)
        stepping += merged.merge_s - folding_s  # a merge of gathered updates is made while it is read
        self.payload, self.model_sha256 = self._next_base()
        self.progress = self.progress.after_round(
            self.progress.sequential_step + self.federation.tau, merged.tokens, mean_cosine(merged.cosine)
        )

        # 4. Remember how nodes behaved and say what happened; `run` commits. (This round's commit is not over when its
        #    line is written.)
        self._remember(merged)
        self._read_network()
        outer_s = time.monotonic() - stepping
        phases_s = {
            "assembly": assembly_s,
            "nodes": nodes_s,
            "merge": merged.merge_s,
            "outer": outer_s,
            "commit of the round before": self._commit_s,
        }
        seen = replace(self.progress, seconds=self._seconds())
        self.tracker.write(round_event(seen, self.ledger, merged, stepped, self.trust.suspended, phases_s))

    @property
    def _nodes_per_round(self) -> int:
        """K; the baseline has one node that trains."""
        return 1 if self.recipe.federation.outer == "none" else self.recipe.nodes_per_round

    def _assemble(self) -> list[NodeInfo]:
        quorum = quorum_of(self.recipe.federation.quorum, self._nodes_per_round)
        call = RollCall.of(self.recipe, self.progress.round, self.trust.suspended, quorum, self._absent)
        present = assemble(self.fabric, self.ledger, self.tracker, call, self.late)
        self._absent = frozenset(call.missing({info.name for info in present if info.trains}))
        return [info for info in present if info.name not in self.late.tasks]

    def _sample(self, present: list[NodeInfo]) -> Draw:
        trainers = [info.name for info in present if info.trains]
        return draw_round(self.recipe, self.progress.round, trainers, self._nodes_per_round)

    def _gather(self, draw: Draw, present: list[NodeInfo]) -> Merged:
        """Train on the nodes drawn and merge. Raises RoundFailedError if fewer than the quorum can be used."""
        left = {info.name: info for info in present if info.name not in draw.dropped}
        nodes, there = [left[name] for name in draw.asked], list(left.values())
        tasks = self._asks().all(nodes, there)
        training = self.late.tasks | {info.name: tasks[info.name] for info in nodes}
        limits = self.late.limits_with({info.name: info.tokens_per_step for info in nodes})
        heldout_limits = {info.name: info.evaluation_tokens for info in there}
        uniform, one = self.recipe.federation.weighting == "uniform", UNIFORM_WEIGHT if self.method.late_rounds else 1
        base = self._base()
        bound = self._norm_bound(base)
        merge = self._merge(base, sum(one if uniform else task.tau * limits[name] for name, task in training.items()))
        merged, watch = Merged(), Stopwatch()
        exchange = self._exchange(draw.nodes)
        exchange.send({name: self._told(task) for name, task in tasks.items()})
        self._foretell(nodes, [info.name for info in present if info.trains])
        for task, message in watch.split(exchange.replies(), "nodes", "merge"):
            reply, node, age = expect_reply(message), task.node, self.late.age(task)
            own = bound.since(task.sequential_step) if age else bound
            try:  # all of a reply is checked before any of it counts
                scores = evaluation_report(reply, heldout_limits[node]) if task.evaluate and not age else None
                if task.tau > 0:
                    verified = verify_training(message, task, limits[node], base, self.reader)
                    verify_norm(verified.norm, self.recipe.link.max_update_norm)
                    report = training_report(reply)
                    if self._bounds_norms:
                        own.verify(verified.norm, report.steps)
            except (ReplyRefusedError, WireError) as error:
                exchange.refuse(node, str(error))
                continue
            self.downlink.heard(node, task.base_sha256)
            if scores is not None:
                merged.tally.add(node, scores)
            if task.tau == 0:
                continue
            self.ledger.add(node, Traffic(up=Flow(stages=verified.stage_bytes)))
            weight = one if uniform else report.tokens
            _take_in(merge, node, self.reader.read(message, base), self.method.late_weight(weight, age))
            merged.reports[node], merged.norms[node], merged.ages[node] = report, verified.norm, age
            merged.accepted[node] = own.entry(verified.norm, report.steps)
            merged.samples[node] = sample_update(self.reader.read(message, base), base)
            del message, reply  # freed before the next one arrives, not after
        merged.missing, merged.refused = draw.dropped | exchange.missing, exchange.refused
        merged.merge_s = watch.seconds["merge"]
        if not exchange.quorum_is_met:
            raise RoundFailedError(
                f"round {self.progress.round}: {exchange.complaint()} "
                "The rounds before are safe: mend the nodes and resume."
            )
        merged.pseudo_gradient = merged.timed(merge.result()) if isinstance(merge, Gathered) else merge.result()
        return merged

    def _foretell(self, nodes: list[NodeInfo], trainers: list[str]) -> None:
        """Tell those that train now what they will be asked next, where that is known; done with this, they begin it.

        `trainers` are all from whom the next round will draw, if nobody comes or goes. `photon.aggregator.early` says
        why the rest is known, and what comes of it if it was wrong.
        """
        federation, now = self.recipe.federation, self.progress
        if not (self.fabric.foretells and self.outer.holds_back and self.method.knows_next(federation)):
            return
        step, names = now.sequential_step + self.federation.tau, [info.name for info in nodes]
        seed, present = self._downlink_seed(now.round + 1), Present(self.payload, self.model_sha256, names)
        try:
            base = foresee(self.outer, self.downlink, self.store, present, seed, self.moved)
        except StateError as error:  # there may be no room for it beside what this round ends in
            self.tracker.note(f"what comes next is not told: {error}")
            return
        moment = Moment(now.round + 1, step, federation.sequential_steps, tau=self.federation.tau)
        tau = self.method.federation(federation, moment).tau
        later = replace(now, round=now.round + 1, sequential_step=step)
        drawn = draw_round(self.recipe, later.round, trainers, self._nodes_per_round).asked
        tasks = RoundTasks(self.recipe, later, base.sha256, tau, self._nodes_per_round)
        for name, task in tasks.all([info for info in nodes if info.name in drawn], []).items():
            early, told = telling(task, base.tell(name))
            self.fabric.foretell(name, seal(early, told.body))

    def _merge(self, base: Mapping[str, Tensor], max_weight: int) -> Merge | Gathered:
        """What takes the updates of a round in: the weighted mean at once, another merge when all are there."""
        if (rule := self.method.merged) is None:
            return Merge(base, max_weight)
        return Gathered(self.store.spool, base, rule)

    def _base(self) -> Mapping[str, Tensor]:
        """What updates are taken from; of local weights, where that is not the exact model, what nodes hold."""
        base = decode_tensors(self.payload) if self.downlink.sends_other_weights else self.outer.weights()
        return {name: base[name] for name in self.exchanged}

    def _norm_bound(self, base: Mapping[str, Tensor]) -> NormBound:
        progress, method = self.progress, self.method
        norms, rounds = same_turns(
            progress.norms, progress.round, method.period, lambda turn: method.exchanged(self._shapes, turn)
        )
        behind = rounds if method.keeps_weights else 1
        first_step = max(0, progress.sequential_step - (behind - 1) * self.federation.tau)
        return NormBound(norms, base, first_step, self.recipe.node.warmup_steps, behind)

    @property
    def _bounds_norms(self) -> bool:
        """The baseline's only node has nobody to differ from, and whoever runs it owns it."""
        return self.recipe.federation.norm_bound and self.recipe.federation.outer != "none"

    def _remember(self, merged: Merged) -> None:
        """What later rounds judge nodes by; committed with this one."""
        period = self.method.period
        self.trust.charge(self.progress.round - 1, merged.refused)
        self.progress = replace(
            self.progress,
            norms=remember(self.progress.norms, [merged.accepted[name] for name in sorted(merged.accepted)], period),
            seconds_per_step=measured(self.progress.seconds_per_step, merged.reports),
        )

    def _final_evaluation(self) -> None:
        """Score the finished model at every owner: no round follows that would do it on the way."""
        call = RollCall.of(self.recipe, self.progress.round, self.trust.suspended, 0, self._absent)
        present = assemble(self.fabric, self.ledger, self.tracker, call)
        exchange, asks = self._exchange(), self._asks()
        limits = {info.name: info.evaluation_tokens for info in present if info.evaluates}
        exchange.send({name: self._told(asks.one(name, 0, evaluate=True)) for name in limits})
        tally = Tally()
        for task, message in exchange.replies():
            try:
                tally.add(task.node, evaluation_report(expect_reply(message), limits[task.node]))
            except ReplyRefusedError as error:
                exchange.refuse(task.node, str(error))
        self.trust.charge(self.progress.round, exchange.refused)
        if lacking := dict.fromkeys(call.missing({info.name for info in present}), "not connected") | exchange.missing:
            self.tracker.note(f"the final score lacks {', '.join(sorted(lacking))}: {lacking}")
        if not tally.is_empty:
            if self.fabric.carried() is not None:
                time.sleep(_ACCOUNTS_S)  # the last reading of the run should miss nothing
            self._read_network()
            self.progress = replace(self.progress, link=self.ledger.total, seconds=self._seconds())
            self.tracker.write(self._evaluated(tally))

    def _evaluated(self, tally: Tally) -> Evaluated:
        """Scores of the base, beside what that base had cost when it was committed."""
        return Evaluated(
            time=time.time(),
            seconds=self.progress.seconds,
            round=self.progress.round,
            sequential_step=self.progress.sequential_step,
            tokens=self.progress.tokens,
            bytes_up=self.progress.link.up.encoded,
            bytes_down=self.progress.link.down.encoded,
            link=self.progress.link,
            pooled=tally.pooled(),
            silos=tally.silos(),
        )

    def _commit(self) -> None:
        """Make the current state durable: after this a crash loses nothing up to here."""
        began = time.monotonic()
        self.progress = replace(
            self.progress,
            link=self.ledger.total,
            message_from=self.downlink.message_from,
            message_as=self.downlink.written_as,
            message_stages=dict(self.downlink.stage_bytes),
            holders=dict(self.downlink.holders),
            seconds=self._seconds(),
            metrics_bytes=self.tracker.sync(),
            charges=dict(self.trust.charges),
        )
        self.store.commit(self.state())
        # From here on the model as it travels is read from its file: one model less in memory while nodes work.
        self.payload = self.store.model_file(self.progress.round)
        self.downlink.message = self.store.message_file(self.progress.round)
        self.trust.committed()
        self._commit_s = time.monotonic() - began

    def state(self) -> GlobalState:
        """The state as it would be committed now."""
        downlink = self.downlink.export_state(self.outer.weights())
        return GlobalState(self.progress, self.payload, self.outer.export_state(), downlink, self.downlink.message)

    def _asks(self) -> RoundTasks:
        return RoundTasks(self.recipe, self.progress, self.model_sha256, self.federation.tau, self._nodes_per_round)

    def _exchange(self, nodes: int | None = None) -> Exchange:
        federation = self.recipe.federation
        patience = Patience(federation.quorum, federation.grace_s, federation.deadline_s, nodes)
        progress, whole, raw = self.tracker.progress, self._told_whole, self._raw_bytes()
        return Exchange(self.fabric, self.ledger, patience, progress, whole, raw, self.late)

    def _raw_bytes(self) -> RawBytes:
        """As float32: all that is shared, what of it the round before has moved, what this one exchanges."""
        before = self.progress.round - 1
        moved = self.method.moved(self._shapes, before, is_last=self._is_over()) if before >= 0 else []
        return RawBytes(*(4 * self._values(names) for names in (self._shapes, moved, self.exchanged)))

    def _values(self, names: Iterable[str]) -> int:
        return sum(prod(self._shapes[name]) for name in names)

    def _told(self, task: Task) -> tuple[Task, Told]:
        """A task, and what tells its node the base."""
        is_untrained = self.progress.round == 0
        return telling(task, self.downlink.tell(task.node, self.payload, self.model_sha256, is_untrained))

    def _told_whole(self, task: Task) -> tuple[Task, Told]:
        """The same task anew, for a node that lacks what it was to build on."""
        told = self.downlink.tell_whole(self.payload, self.model_sha256)
        return telling(task.model_copy(update={"nonce": secrets.token_hex(8)}), told)

    def _next_base(self) -> tuple[Body, str]:
        """The base of the next round in a file, tensor by tensor, and its sha256."""
        weights = self.outer.weights()
        if self.downlink.is_exact:
            return self.store.draft_model(tensor_chunks(weights))
        seed = self._downlink_seed(self.progress.round + 1)
        tensors = self.downlink.advance(weights, self.payload, self.model_sha256, seed, self.moved)
        return self.store.draft_model(streamed_chunks(weights, tensors))

    def _downlink_seed(self, round_index: int) -> str:
        return f"{self.recipe.seed}/down/{round_index}"

    def _read_network(self) -> None:
        """Bring the ledger up to what the network has carried, if there is one."""
        if (sent := self.fabric.carried()) is not None:
            self.ledger.sent(sent)

    def _seconds(self) -> float:
        return time.monotonic() - self._clock_zero


def _take_in(merge: Merge | Gathered, node: str, update: Iterator[tuple[str, Tensor]], weight: int) -> None:
    if isinstance(merge, Gathered):
        merge.keep(node, update, weight)
    else:
        merge.fold(update, weight)
