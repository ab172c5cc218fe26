"""What of a node's work is said, and to whom: all of it in the owner's own log, little to the Aggregator."""

from __future__ import annotations

import time

from photon.link.update import Sealed, Serialised, decode_message, expect_reply, seal
from photon.node.trainer import TrainingError


def say(text: str) -> None:
    """A line of the node's own log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def public_reason(kind: str) -> str:
    """Why a task failed, as the Aggregator may know it: an owner's paths and text are in no message to others."""
    return f"{kind}; the node's own log says more"


def without_secrets(message: Serialised) -> Sealed:
    """The trainer's reply as it may leave the site: the reason of a failure can name the owner's paths."""
    sealed = message if isinstance(message, Sealed) else Sealed(bytes(message), b"")
    reply = expect_reply(decode_message(sealed))
    if reply.status == "ok":
        return sealed
    say(f"round {reply.round}: {reply.error}")
    kind = reply.error.partition(":")[0]
    reason = reply.error if kind == TrainingError.__name__ else public_reason(kind)
    return seal(reply.model_copy(update={"error": reason}))
