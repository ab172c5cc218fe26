"""Held-out scores: each silo's sums, pooled exactly."""

from __future__ import annotations

import math

from photon.events import Scores
from photon.link.update import EvaluationReport


class Tally:
    """Collects the owners' sums; a mean of means would weigh a small silo like a large one."""

    def __init__(self) -> None:
        self._reports: dict[str, EvaluationReport] = {}

    def add(self, silo: str, report: EvaluationReport) -> None:
        """Record one owner's sums."""
        self._reports[silo] = report

    @property
    def is_empty(self) -> bool:
        """Whether no owner has answered."""
        return not self._reports

    def seconds(self, silo: str) -> float:
        """What an owner's evaluation took; 0 if it made none."""
        return self._reports[silo].seconds if silo in self._reports else 0.0

    def silos(self) -> dict[str, Scores]:
        """Scores by silo, in the order of their names."""
        return {name: scores_of([self._reports[name]]) for name in sorted(self._reports)}

    def pooled(self) -> Scores:
        """Scores over all tokens of all silos."""
        return scores_of([self._reports[name] for name in sorted(self._reports)])


def scores_of(reports: list[EvaluationReport]) -> Scores:
    """Loss in nats per token, its exponential, and bits per byte of text."""
    nats = math.fsum(report.nats for report in reports)
    tokens = sum(report.tokens for report in reports)
    text_bytes = math.fsum(report.text_bytes for report in reports)
    unigram = math.fsum(report.unigram_nats for report in reports)
    loss = nats / tokens
    return Scores(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / text_bytes,
        unigram_excess=loss - unigram / tokens,
        tokens=tokens,
    )
