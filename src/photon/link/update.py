"""The wire format: what an Aggregator asks of an LLM Node, and what the node answers.

A message is `PHTN` | version (1 byte) | header length (4 bytes, little endian) | header (JSON) | body (safetensors).
The header says who, which round and on which base; the body carries weights (down) or the pseudo-gradient (up).
Nothing in it can be executed, and both parts are checked against their declared bounds before use.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.config import Name
from photon.errors import WireError
from photon.link.body import Body, FileBody

MAGIC = b"PHTN"
VERSION = 2
MAX_HEADER_BYTES = 2**20
MAX_CODEC_CHARACTERS = 1024
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_PREFIX_BYTES = len(MAGIC) + 1 + 4
_ALIGNMENT_BYTES = 64

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Natural = Annotated[int, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    run: str = Field(max_length=64)
    round: Natural
    node: Name
    nonce: str = Field(max_length=64)
    base_sha256: Hash


class Task(_Header):
    """Down: score the base on held-out text if asked, then train `tau` local steps from it.

    The base is the model whose safetensors bytes have the hash `base_sha256`. The body holds all of it (`whole`), or
    what it differs by from the one with the hash `held_sha256` (`difference`), or nothing, since the node has it
    (`held`); `codec` says how the body's tensors are written.
    """

    kind: Literal["task"] = "task"
    form: Literal["whole", "difference", "held"] = "whole"
    held_sha256: Hash = Field(EMPTY_SHA256, description="Of a difference: the base that it is added to.")
    codec: str = Field("exact", max_length=MAX_CODEC_CHARACTERS)
    body_sha256: Hash = EMPTY_SHA256
    evaluate: bool = Field(description="Score the base before training; the body need not be sent a second time.")
    sequential_step: Natural = Field(description="t * tau: where the learning-rate schedule stands.")
    tau: Natural = Field(description="Local steps; 0 = only evaluate.")
    nodes: Natural = Field(ge=1, description="K: a site's recipe has itself alone.")
    deadline_s: Number = Field(gt=0, description="A node hands in what it has after so many seconds.")

    def is_same_work(self, other: Task) -> bool:
        """Whether doing one is doing the other: they may differ in nonce, patience, and how the base is told."""
        told = ("nonce", "deadline_s", "form", "held_sha256", "codec", "body_sha256")
        return self.model_copy(update={name: getattr(other, name) for name in told}) == other


class TrainingReport(BaseModel):
    """What a node says of its local steps; `tokens` are those really trained on and weigh the merge."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tokens: Natural
    steps: Natural
    loss_first: Number
    loss_last: Number
    loss_mean: Number
    gradient_norm_mean: Number
    clipped_steps: Natural
    learning_rate: Number
    seconds: Number
    epoch: Number
    receive_s: Number = Field(0.0, description="To decode and load what it was sent, and its own state.")
    encode_s: Number = Field(0.0, description="To make the update what it is on the wire.")
    save_s: Number = Field(0.0, description="To write update and state to its disk.")


class EvaluationReport(BaseModel):
    """Held-out sums, not means, so that pooling is exact."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    nats: Number
    tokens: Natural
    text_bytes: Number = Field(ge=0, description="UTF-8 bytes those tokens stand for.")
    unigram_nats: Number = Field(description="Cross-entropy of the same tokens under the silo's unigram.")
    seconds: Number = 0.0


class Reply(_Header):
    """Up: the pseudo-gradient `base - local` in the body and a report, or the reason why there is none.

    With the status `lacks` the node asks for the whole base: it does not have the one that the task builds on.
    """

    kind: Literal["reply"] = "reply"
    status: Literal["ok", "failed", "lacks"]
    error: str = Field("", max_length=2000)
    codec: str = Field("exact", max_length=MAX_CODEC_CHARACTERS)
    body_sha256: Hash = Field(EMPTY_SHA256, description="Of the body: one flipped bit is noticed.")
    training: TrainingReport | None = None
    evaluation: EvaluationReport | None = None


@dataclass(frozen=True)
class Message:
    """A parsed message; `body` is a view of the received buffer, or still in the file that it arrived in."""

    header: Task | Reply
    body: memoryview | FileBody


@dataclass(frozen=True)
class Sealed:
    """A serialised message whose body lies elsewhere: tasks to many nodes share one, a large one stays in its file.

    `len` is the bytes of the whole message.
    """

    head: bytes
    body: Body

    def __len__(self) -> int:
        return len(self.head) + len(self.body)

    def joined(self) -> bytes:
        """The message in one piece, in memory."""
        body = self.body.read(0, len(self.body)) if isinstance(self.body, FileBody) else self.body
        return b"".join((self.head, body))


Serialised = bytes | bytearray | memoryview | Sealed


def encode_message(header: Task | Reply, body: bytes | bytearray | memoryview = b"") -> bytes:
    """Serialise a message in one piece."""
    return seal(header, body).joined()


def seal(header: Task | Reply, body: Body = b"") -> Sealed:
    """Serialise a message without copying its body. Raises WireError if the header is too long."""
    text = header.model_dump_json().encode()
    # JSON may end in spaces: pad, so that the tensors in the body can be viewed in place.
    text += b" " * (-(_PREFIX_BYTES + len(text)) % _ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise WireError(f"header of {len(text)} bytes exceeds {MAX_HEADER_BYTES}")
    return Sealed(b"".join((MAGIC, bytes([VERSION]), len(text).to_bytes(4, "little"), text)), body)


def decode_message(data: Serialised) -> Message:
    """Parse a message. Raises WireError on anything malformed; allocates no more than the header's size."""
    head = data.head if isinstance(data, Sealed) else data
    view = memoryview(head).cast("B")
    if len(view) < _PREFIX_BYTES or view[: len(MAGIC)] != MAGIC:
        raise WireError("not a Photon message: the first bytes are not 'PHTN'")
    if view[len(MAGIC)] != VERSION:
        raise WireError(
            f"message of wire version {view[len(MAGIC)]}, this Photon speaks {VERSION}: update the older end"
        )
    length = int.from_bytes(view[len(MAGIC) + 1 : _PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES or _PREFIX_BYTES + length > len(view):
        raise WireError(f"header declares {length} bytes; the message has {len(view)}")
    header, rest = _parse_header(bytes(view[_PREFIX_BYTES : _PREFIX_BYTES + length])), view[_PREFIX_BYTES + length :]
    if not isinstance(data, Sealed):
        return Message(header, rest)
    if rest:
        raise WireError(f"{len(rest)} bytes stand between the header and the body")
    return Message(header, data.body if isinstance(data.body, FileBody) else memoryview(data.body).cast("B"))


def _parse_header(text: bytes) -> Task | Reply:
    kind: type[Task | Reply] = Task if b'"kind":"task"' in text else Reply
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "header"
        raise WireError(f"malformed {kind.__name__.lower()} header: {place}: {first['msg']}") from None


def expect_task(message: Message) -> Task:
    """The header as a Task. Raises WireError on a reply."""
    if not isinstance(message.header, Task):
        raise WireError("a node was sent a reply, not a task")
    return message.header


def expect_reply(message: Message) -> Reply:
    """The header as a Reply. Raises WireError on a task."""
    if not isinstance(message.header, Reply):
        raise WireError("the Aggregator was sent a task, not a reply")
    return message.header
