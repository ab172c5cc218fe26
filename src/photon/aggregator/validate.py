"""Everything a reply claims is checked before it touches the merge.

A refusal costs the node its contribution to this round and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.aggregator.merge import MAX_ABS_UPDATE
from photon.aggregator.norms import squares_of
from photon.aggregator.updates import UpdateReader
from photon.errors import ReplyRefusedError
from photon.link.tensors import sha256_hex
from photon.link.update import EvaluationReport, Message, Reply, Task, TrainingReport, expect_reply

# Nats, or bytes of text, that one held-out token may stand for, and tokens that a byte may: far beyond any model or
# tokenizer.
MAX_PER_TOKEN = 1e4
_MOST_SECONDS = 1e9  # 31 years, and means of many are still finite numbers
# What a report says for the record alone must not spoil the record: sums and means of it stay finite numbers.
_MOST_REPORTED = {
    "loss_first": MAX_PER_TOKEN,
    "loss_last": MAX_PER_TOKEN,
    "loss_mean": MAX_PER_TOKEN,
    "gradient_norm_mean": 3.5e38,  # float32's largest
    "learning_rate": 1e6,
    "seconds": _MOST_SECONDS,
    "epoch": 1e9,
    "receive_s": _MOST_SECONDS,
    "encode_s": _MOST_SECONDS,
    "save_s": _MOST_SECONDS,
}


class NodeFailedError(ReplyRefusedError):
    """The node itself says that it could not do the task: nothing to merge, and nothing to hold against it."""


def verify_identity(sender: str, reply: Reply, task: Task) -> None:
    """Raises ReplyRefusedError unless the reply answers this very task and comes from the node it was sent to.

    Raises NodeFailedError if it does, and says that the node has failed.
    """
    if sender != task.node or reply.node != task.node:
        raise ReplyRefusedError(f"sent by {sender!r} in the name of {reply.node!r} for a task of {task.node!r}")
    for field in ("run", "round", "base_sha256", "nonce"):
        if getattr(reply, field) != getattr(task, field):
            raise ReplyRefusedError(f"answers another task: its {field} is not the one that was asked for")
    if reply.status == "failed":
        raise NodeFailedError(f"the node reports: {reply.error or 'no reason given'}")


@dataclass(frozen=True)
class Verified:
    """What a good update comes to: its L2 norm, and the bytes that were left of it after each stage of the codec."""

    norm: float
    stage_bytes: dict[str, int]


def verify_training(
    message: Message, task: Task, tokens_per_step: int, base: Mapping[str, Tensor], reader: UpdateReader
) -> Verified:
    """Check a train reply's report and update.

    Raises ReplyRefusedError or WireError. Reads the update once, tensor by tensor, holding one at a time.
    """
    reply = expect_reply(message)
    report = training_report(reply)
    if sha256_hex(message.body) != reply.body_sha256:
        raise ReplyRefusedError("its update was damaged on the way: the sha256 differs")
    if not 0 < report.steps <= task.tau:
        raise ReplyRefusedError(f"claims {report.steps} steps of a task of {task.tau}")
    if not 0 < report.tokens <= report.steps * tokens_per_step:
        raise ReplyRefusedError(
            f"claims {report.tokens} tokens in {report.steps} steps; it can train at most {tokens_per_step} per step"
        )
    squares, stage_bytes = 0.0, dict[str, int]()
    for name, delta in reader.read(message, base, stage_bytes):
        if not delta.numel():
            continue
        largest = max(abs(float(end)) for end in torch.aminmax(delta))
        # NaN compares false with everything: ask for what is good, not for what is bad.
        if not largest <= MAX_ABS_UPDATE:
            raise ReplyRefusedError(f"tensor {name!r} holds {largest}: not finite, or beyond {MAX_ABS_UPDATE:g}")
        squares += squares_of(delta)
    return Verified(float(squares**0.5), stage_bytes)


def verify_norm(norm: float, max_update_norm: float | None) -> None:
    """Raises ReplyRefusedError if the node did not keep the update norm that the recipe sets (1% is for rounding)."""
    if max_update_norm is not None and norm > 1.01 * max_update_norm:
        raise ReplyRefusedError(f"its update has norm {norm:.4g}, link.max_update_norm is {max_update_norm:.4g}")


def training_report(reply: Reply) -> TrainingReport:
    """The report of a train reply. Raises ReplyRefusedError if there is none, or its numbers cannot be."""
    report = reply.training
    if report is None:
        raise ReplyRefusedError("carries no training report")
    for name, most in _MOST_REPORTED.items():
        if not 0 <= getattr(report, name) <= most:
            raise ReplyRefusedError(f"claims {getattr(report, name):g} as its {name}; it is from 0 to {most:g}")
    if report.clipped_steps > report.steps:
        raise ReplyRefusedError(f"claims {report.clipped_steps} clipped steps of {report.steps}")
    return report


def evaluation_report(reply: Reply, max_tokens: int) -> EvaluationReport:
    """The report of an evaluate reply. Raises ReplyRefusedError if there is none, or its numbers cannot be."""
    report = reply.evaluation
    if report is None or report.tokens < 1 or report.text_bytes <= 0:
        raise ReplyRefusedError("carries no evaluation report")
    if report.tokens > max_tokens:
        raise ReplyRefusedError(f"claims a score over {report.tokens} held-out tokens; it can have {max_tokens}")
    for name in ("nats", "unigram_nats", "text_bytes"):
        if not 0 <= getattr(report, name) <= MAX_PER_TOKEN * report.tokens:
            raise ReplyRefusedError(f"claims {getattr(report, name):g} {name} for {report.tokens} tokens")
    if report.text_bytes * MAX_PER_TOKEN < report.tokens:  # bits a byte would be infinite
        raise ReplyRefusedError(f"claims {report.text_bytes:g} bytes of text for {report.tokens} tokens")
    if not 0 <= report.seconds <= _MOST_SECONDS:
        raise ReplyRefusedError(f"took {report.seconds:g} seconds to score; it is from 0 to {_MOST_SECONDS:g}")
    return report
