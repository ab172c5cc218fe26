"""What a round came to, and what is recorded of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from photon.aggregator.drift import pairwise_cosine
from photon.aggregator.outer import Stepped
from photon.aggregator.scores import Tally
from photon.aggregator.state import Progress
from photon.events import NodeRound, RoundDone
from photon.link.ledger import Ledger, Traffic
from photon.link.update import TrainingReport
from photon.stopwatch import Stopwatch


@dataclass
class Merged:
    """What a round's replies add up to. The pseudo-gradient is made as it is read, once."""

    pseudo_gradient: Iterable[tuple[str, Tensor]] = ()
    reports: dict[str, TrainingReport] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, tuple[float, int]] = field(default_factory=dict)  # as the norm history keeps them
    ages: dict[str, int] = field(default_factory=dict)  # rounds that the base of an update was behind
    tally: Tally = field(default_factory=Tally)
    merge_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens trained on, over all nodes that count."""
        return sum(report.tokens for report in self.reports.values())

    @cached_property
    def cosine(self) -> list[list[float]]:
        """Of each pair of updates; asked for once all are in."""
        return pairwise_cosine(self.samples)

    def timed(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors; the time that it takes to make them belongs to the merge."""
        watch = Stopwatch()
        yield from watch.split(tensors, "merge", "outer")
        self.merge_s += watch.seconds["merge"]


def round_event(
    progress: Progress,
    ledger: Ledger,
    merged: Merged,
    stepped: Stepped,
    suspended: dict[str, str],
    phases_s: dict[str, float],
) -> RoundDone:
    """The record of the round that `progress` has just reached."""
    reports, tokens = merged.reports, merged.tokens
    return RoundDone(
        time=time.time(),
        seconds=progress.seconds,
        round=progress.round,
        sequential_step=progress.sequential_step,
        tokens=progress.tokens,
        round_tokens=tokens,
        tokens_per_second=tokens / max(sum(phases_s.values()), 1e-9),
        bytes_up=ledger.total.up.encoded,
        bytes_down=ledger.total.down.encoded,
        round_bytes_up=ledger.round.up.encoded,
        round_bytes_down=ledger.round.down.encoded,
        link=ledger.total,
        round_link=dict(sorted(ledger.nodes.items())),
        train_loss=sum(reports[name].loss_mean * reports[name].tokens for name in sorted(reports)) / tokens,
        learning_rate=max(report.learning_rate for report in reports.values()),
        merged_norm=stepped.gradient_norm,
        outer_norm=stepped.moved_norm,
        nodes={
            name: node_round(reports[name], merged.norms[name], ledger.of(name), merged.tally.seconds(name)).model_copy(
                update={"age": merged.ages.get(name, 0)}
            )
            for name in sorted(reports)
        },
        missing=dict(sorted(merged.missing.items())),
        suspended=suspended,
        cosine=merged.cosine,
        phases_s=phases_s,
    )


def node_round(report: TrainingReport, update_norm: float, traffic: Traffic, evaluation_seconds: float) -> NodeRound:
    """A report of its training beside what the Aggregator measured: norm, bytes, seconds of scoring."""
    return NodeRound(
        **report.model_dump(exclude={"learning_rate"}),
        update_norm=update_norm,
        evaluation_seconds=evaluation_seconds,
        tokens_per_second=report.tokens / max(report.seconds, 1e-9),
        bytes_up=traffic.up.encoded,
        bytes_down=traffic.down.encoded,
    )
