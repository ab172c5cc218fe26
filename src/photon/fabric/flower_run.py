"""One run of Flower, driven by the Aggregator itself: what a ServerApp process would be beside the SuperLink.

No app is fetched, unpacked or run: the bundle that Flower asks for when a run starts holds one pyproject.toml that
names no code, and nodes never ask for it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from photon.fabric import flwr_internals as flower
from photon.fabric.flwr_internals import CALL_TIMEOUT_S, Content, FlowerDownError, failures

_ARRIVAL_S = 8.0  # an answer is announced before its parts are sent; one that is not whole by then never will be
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_SERVERAPP = "flwr-serverapp"
# Flower wants an app to start a run. This one has no code and asks for none; nodes of Photon never fetch it.
_APP = """[project]
name = "photon"
version = "1.0.0"
description = "Photon's control messages; the code is the installed package"
license = { text = "Apache-2.0" }
dependencies = []
[tool.flwr.app]
publisher = "photon"
[tool.flwr.app.components]
serverapp = "photon:none"
clientapp = "photon:none"
[tool.flwr.app.config]
"""


@dataclass(frozen=True)
class FlowerNode:
    """A node as the SuperLink knows it. `activated_at` changes when the node was started anew or came back."""

    node_id: int
    key: bytes
    activated_at: str
    is_online: bool


@dataclass(frozen=True)
class FlowerReply:
    """The answer to a message: content, or the reason why there is none: Flower's `error`, or the node sent `junk`."""

    message_id: str
    node_id: int
    content: Content | None
    error: str = ""
    junk: str = ""


@dataclass(frozen=True)
class _Arriving:
    """An answer whose parts may not be here yet."""

    announced: flower.ProtoMessage
    tree: flower.ObjectTree
    until: float


class _NotYetError(Exception):
    """A part of a message that was announced and has not been sent yet."""


class FlowerRun:
    """One run of Flower, driven from this process. Everything here fails fast with FlowerDownError."""

    def __init__(self, address: str, secret: bytes) -> None:
        """Start a run at the SuperLink on `address` (host:port) and take its only task."""
        self._node = flower.Node(node_id=flower.SUPERLINK_NODE_ID)
        self._arriving: list[_Arriving] = []
        with failures("start a run"):
            self.run_id = _start_run(address)
            self._client = flower.direct(
                flower.RuntimeHttpClient(
                    f"http://{address}",
                    interceptors=[
                        flower.RuntimeVersionHttpInterceptor(component_name=_SERVERAPP),
                        flower.RuntimeTokenHttpInterceptor(token=_acquire(address, secret, self.run_id)),
                    ],
                    timeout=CALL_TIMEOUT_S,
                )
            )
            self._client.PullTaskInput(flower.PullTaskInputRequest())

    def heartbeat(self) -> None:
        """Say that the run goes on; wanted at least every 30 seconds."""
        with failures("send a heartbeat"):
            if not self._client.SendTaskHeartbeat(flower.SendTaskHeartbeatRequest()).success:
                raise FlowerDownError("the SuperLink has given this run up", status=403)

    def nodes(self) -> list[FlowerNode]:
        """Every node that the SuperLink holds for online."""
        with failures("list the nodes"):
            found = self._client.GetNodes(flower.GetNodesRequest()).nodes
        return [FlowerNode(n.node_id, bytes(n.public_key), n.last_activated_at, n.status == "online") for n in found]

    def push(self, node_id: int, content: Content, ttl_s: float) -> str:
        """Send a message to a node; its id. With the status 404 it is the node that cannot be sent any."""
        ours = flower.SUPERLINK_NODE_ID
        metadata = flower.Metadata(self.run_id, "", ours, node_id, "", "", time.time(), ttl_s, flower.MESSAGE_TYPE)
        with failures("send a message"), flower.no_object_id_recompute():
            message = flower.new_message(metadata, content)
            response = self._client.PushMessages(
                flower.PushAppMessagesRequest(
                    messages_list=[flower.message_to_proto(flower.remove_content_from_message(message))],
                    message_object_trees=[flower.get_object_tree(message)],
                )
            )
            if not response.message_ids or not response.message_ids[0]:
                raise FlowerDownError(f"the SuperLink took no message for node {node_id}: it is not there", status=404)
            push = flower.make_push_object_fn_protobuf(
                self._client.PushObject, self._node, self.run_id, response.session_id
            )
            wanted = set(response.objects_to_push)
            try:
                flower.push_objects(flower.get_all_nested_objects(message), push, object_ids_to_push=wanted)
            except flower.ObjectPushError as error:  # a node may confirm what it has not received: it is removed then
                raise FlowerDownError(f"node {node_id} did not wait for its message: {error}", status=404) from error
        return str(response.message_ids[0])

    def pull(self, message_ids: Iterable[str]) -> list[FlowerReply]:
        """The answers to these messages that are here. One that is still being sent is looked for in later calls.

        So nobody waits for a node that announces an answer and does not send it.
        """
        with failures("fetch replies"):
            arriving = {one.announced.metadata.reply_to_message_id for one in self._arriving}
            self._announce(set(message_ids) - arriving)
            replies, waiting, self._arriving = [], self._arriving, []
            for one in waiting:
                try:
                    replies.append(self._pull_one(one.announced, one.tree))
                except _NotYetError:
                    if time.monotonic() < one.until:
                        self._arriving.append(one)
                    else:
                        replies.append(self._dropped(one.announced, "its answer was announced and never sent"))
        return replies

    def close(self) -> None:
        """End the run, as far as that can be said to anybody."""
        with suppress(FlowerDownError), failures("end the run"):  # a SuperLink that is gone has no run to end
            self._client.PushTaskOutput(flower.PushTaskOutputRequest(sub_status="completed", details=""))
        self._client.close()

    def _announce(self, asked: set[str]) -> None:
        """Learn which answers there are. The SuperLink says so once, and then knows nothing more of the question."""
        if asked:
            response = self._client.PullMessages(flower.PullAppMessagesRequest(message_ids=sorted(asked)))
            until = time.monotonic() + _ARRIVAL_S
            for announced, tree in zip(response.messages_list, response.message_object_trees, strict=True):
                self._arriving.append(_Arriving(announced, tree, until))

    def _pull_one(self, announced: flower.ProtoMessage, tree: flower.ObjectTree) -> FlowerReply:
        """Raises _NotYetError."""
        metadata = announced.metadata
        asked, node_id = metadata.reply_to_message_id, metadata.src_node_id
        if announced.HasField("error"):
            return FlowerReply(asked, node_id, None, f"code {announced.error.code}: {announced.error.reason}")
        pull = flower.make_pull_object_fn_protobuf(self._client.PullObject, self._node, self.run_id)

        def pull_now(object_id: str) -> bytes:
            try:
                return bytes(pull(object_id))
            except flower.ObjectUnavailableError:
                raise _NotYetError from None

        try:
            content = flower.fetch_content(metadata.message_id, tree, pull_now)
        except ValueError as error:
            return self._dropped(announced, f"its answer cannot be read: {error}"[:300])
        self._confirm(metadata.message_id)
        return FlowerReply(asked, node_id, content)

    def _dropped(self, announced: flower.ProtoMessage, junk: str) -> FlowerReply:
        metadata = announced.metadata
        self._confirm(metadata.message_id)  # else its parts would stay at the SuperLink
        return FlowerReply(metadata.reply_to_message_id, metadata.src_node_id, None, junk=junk)

    def _confirm(self, message_id: str) -> None:
        self._client.ConfirmMessageReceived(
            flower.ConfirmMessageReceivedRequest(node=self._node, run_id=self.run_id, message_object_id=message_id)
        )


def _start_run(address: str) -> int:
    app = flower.photon_app(_APP)
    control = flower.ControlHttpClient(
        f"http://{address}",
        interceptors=[flower.RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        timeout=CALL_TIMEOUT_S,
    )
    with flower.direct(control):
        fab = flower.fab_to_proto(flower.Fab(hashlib.sha256(app).hexdigest(), app, {}))
        return int(control.StartRun(flower.StartRunRequest(fab=fab)).run_id)


def _acquire(address: str, secret: bytes, run_id: int) -> str:
    """The token of the run's task, within `CALL_TIMEOUT_S`.

    Flower gives out the oldest task first: that of a run that was started and never driven (its starter was killed, or
    was not told in time that it was started) is taken off the queue and left. Its token would serve no other run.
    """
    client = flower.RuntimeHttpClient(
        f"http://{address}",
        interceptors=[
            flower.RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            flower.SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE}),
        ],
        timeout=CALL_TIMEOUT_S,
    )
    with flower.direct(client):
        end = time.monotonic() + CALL_TIMEOUT_S
        while time.monotonic() < end:
            response = client.AcquireTask(flower.AcquireTaskRequest(supported_task_types=[_SERVERAPP]))
            if not response.HasField("task"):
                time.sleep(0.1)
            elif response.token and response.task.run_id == run_id:
                return str(response.token)
    raise FlowerDownError("the SuperLink gave out no task for the run that was just started")
