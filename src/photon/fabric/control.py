"""What the Aggregator and a node say to each other through Flower: a question that carries the task, and an answer.

There is one kind of message. The Aggregator asks a node, again and again, how it is; the question carries the task that
is open for the node, if any, and how long the answer may wait for news. The node answers with its state and, once its
work is done and uploaded, with the header of its reply. A question or an answer that is lost changes nothing: the next
one says the same. So there is no delivery to repeat, and whatever dies and comes back finds its place.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.errors import WireError
from photon.events import NodeProgress
from photon.link.update import Hash, Natural, Number

Content = dict[str, str | bytes]
MAX_WAIT_S = 60.0
_Text = Annotated[str, Field(max_length=300)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Kind = TypeVar("_Kind", bound=_Closed)


class Ask(_Closed):
    """A question to a node. `base_bytes` is the size of the task's base, whose sha256 its header names; `coming_bytes`
    that of the task that will most likely follow.

    `recipe_sha256` is that of the recipe in the run card: a node that has prepared for another fetches the card again.
    """

    version: Literal[1] = 1
    run: str = Field(max_length=64)
    recipe_sha256: Hash
    wait_s: float = Field(ge=0, le=MAX_WAIT_S, allow_inf_nan=False)
    base_bytes: Natural = 0
    coming_bytes: Natural = 0
    dropped: str = Field("", max_length=64, description="Nonce of a task that the Aggregator no longer waits for.")


class NodeStatus(_Closed):
    """How a node is: its work, its speed and how much text it has. Nothing in it names a text, a path or a shard."""

    version: Literal[1] = 1
    photon: str = Field(max_length=32)
    run: str = Field("", max_length=64, description="The run it is prepared for; empty while it prepares.")
    state: Literal["preparing", "ready", "resting", "leaving"]
    note: _Text = ""
    nonce: str = Field("", max_length=64, description="Of the task it works on, or has finished.")
    phase: Literal["idle", "downloading", "waiting", "evaluating", "training", "sending", "done"] = "idle"
    round: Natural = 0
    step: Natural = 0
    steps: Natural = 0
    loss: Number | None = None
    body_bytes: Natural = Field(0, description="Of the finished reply's body, which is uploaded.")
    tokens_available: Natural = 0
    tokens_per_second: Number = 0.0


def ask_content(ask: Ask, head: bytes, coming: bytes = b"") -> Content:
    """A question as Flower carries it; `head` is the header of the open task, `coming` of the next, or empty."""
    content: Content = {"ask": ask.model_dump_json(), "head": head}
    if coming:
        content["coming"] = coming
    return content


def read_ask(content: Content) -> tuple[Ask, bytes]:
    """The question and the task's header. Raises WireError."""
    return _parse(Ask, content, "ask"), _head(content)


def read_coming(content: Content) -> bytes:
    """Of a question the header of the task that will most likely follow; empty if it says nothing of one.

    Raises WireError.
    """
    return _head(content, "coming")


def status_content(status: NodeStatus, head: bytes) -> Content:
    """An answer as Flower carries it; `head` is the header of the finished reply, or empty."""
    return {"status": status.model_dump_json(), "head": head}


def read_status(content: Content) -> tuple[NodeStatus, bytes]:
    """The answer and the reply's header. Raises WireError."""
    return _parse(NodeStatus, content, "status"), _head(content)


def progress_of(node: str, status: NodeStatus) -> NodeProgress:
    """A node's answer as it is shown."""
    states: dict[str, Literal["waiting", "training", "evaluating", "sending"]] = {
        "evaluating": "evaluating",
        "training": "training",
        "sending": "sending",
    }
    note = status.note or ("downloading the base" if status.phase == "downloading" else "")
    return NodeProgress(
        node=node,
        round=status.round,
        state=states.get(status.phase, "waiting"),
        step=status.step,
        steps=status.steps,
        loss=status.loss,
        note=note,
    )


def _head(content: Content, key: str = "head") -> bytes:
    head = content.get(key, b"")
    if not isinstance(head, bytes):
        raise WireError("a control message whose header is not bytes")
    return head


def _parse(kind: type[_Kind], content: Content, key: str) -> _Kind:
    text = content.get(key)
    if not isinstance(text, str):
        raise WireError(f"a control message without {key!r}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise WireError(f"malformed {key}: {'.'.join(map(str, first['loc'])) or 'message'}: {first['msg']}") from None
