"""What is recorded of a node's round."""

from __future__ import annotations

from photon.events import NodeRound
from photon.link.ledger import Traffic
from photon.link.update import TrainingReport


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
