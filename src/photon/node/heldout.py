"""Scoring a model on held-out text: sums that can be added over sources, nodes and owners."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from photon.data.shards import ShardReader
from photon.link.update import EvaluationReport
from photon.node.trainer import Trainer, TrainingError


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of one source, int64 [n, sequence + 1], with what turns nats into bits per byte."""

    sequences: np.ndarray
    bytes_per_token: float
    unigram_loss: float


def held_out(reader: ShardReader, sequence_length: int, max_sequences: int) -> HeldOut:
    """The evaluation set of one source."""
    return HeldOut(reader.heldout(sequence_length, max_sequences), reader.bytes_per_token_heldout, reader.unigram_loss)


def score(trainer: Trainer, parts: Iterable[HeldOut], batch_size: int) -> EvaluationReport:
    """Held-out sums of the trainer's current weights over all `parts`. Raises TrainingError if they are not finite."""
    began = time.monotonic()
    nats, tokens, text_bytes, unigram_nats = 0.0, 0, 0.0, 0.0
    for part in parts:
        part_nats, part_tokens = trainer.evaluate(part.sequences, batch_size)
        nats += part_nats
        tokens += part_tokens
        text_bytes += part_tokens * part.bytes_per_token
        unigram_nats += part_tokens * part.unigram_loss
    if not math.isfinite(nats):
        raise TrainingError(
            f"the model has diverged: its held-out loss is {nats / max(1, tokens)}. Go back to an earlier round "
            "(--round), and lower node.lr, node.muon_lr or federation.outer_lr"
        )
    return EvaluationReport(
        nats=nats,
        tokens=tokens,
        text_bytes=text_bytes,
        unigram_nats=unigram_nats,
        seconds=time.monotonic() - began,
    )
