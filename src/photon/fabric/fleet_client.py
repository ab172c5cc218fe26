"""A node's end of Flower: what a SuperNode would be, without its process, its polling interval and its apps."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import httpx

from photon.fabric import flwr_internals as flower
from photon.fabric.flwr_internals import CALL_TIMEOUT_S, HEARTBEAT_S, Content, FlowerDownError, failures


@dataclass(frozen=True)
class Question:
    """A message that reached a node. `created_at` is on the Aggregator's clock, `received` on this one's monotonic."""

    message_id: str
    run_id: int
    created_at: float
    ttl_s: float
    received: float
    content: Content


class FleetClient:
    """Speaks to Flower through the gateway, which knows who we are by our certificate and signs for us."""

    def __init__(self, url: str, context: ssl.SSLContext | None) -> None:
        verify = context or False
        client = flower.FleetHttpClient(url, verify=verify, timeout=CALL_TIMEOUT_S)
        self._client = flower.direct(client, verify)
        self._node: flower.Node | None = None

    def join(self, last_id: int | None) -> int:
        """Register if need be and go online; the node's id. `last_id`: the one that a life before this one had.

        Raises FlowerDownError: the SuperLink cannot be reached, or still holds that life for alive (try again).
        """
        with failures("join"):
            if last_id is not None:
                _ignore_refusal(lambda: self._client.DeactivateNode(flower.DeactivateNodeRequest(node_id=last_id)))
            try:
                node_id = self._activate()
            except httpx.HTTPStatusError:  # not known yet; or known, online, and without our knowing its id
                _ignore_refusal(lambda: self._client.RegisterNode(flower.RegisterNodeFleetRequest()))
                node_id = self._activate()
            self._node = flower.Node(node_id=node_id)
            return node_id

    def heartbeat(self) -> bool:
        """Say that the node is there. False: the SuperLink does not know it (any more); join again."""
        with failures("send a heartbeat"):
            request = flower.SendNodeHeartbeatRequest(node=self._joined(), heartbeat_interval=HEARTBEAT_S)
            return bool(self._client.SendNodeHeartbeat(request).success)

    def pull(self) -> Question | None:
        """The next message for this node, if there is one; one that is none of ours is dropped."""
        node = self._joined()
        with failures("ask for messages"):
            response = self._client.PullMessages(flower.PullMessagesRequest(node=node))
            received = time.monotonic()
            if not response.messages_list:
                return None
            metadata = flower.message_from_proto(response.messages_list[0]).metadata
            pull = flower.make_pull_object_fn_protobuf(self._client.PullObject, node, metadata.run_id)
            try:
                content = flower.fetch_content(metadata.message_id, response.message_object_trees[0], pull)
            except ValueError:
                return None
            self._client.ConfirmMessageReceived(
                flower.ConfirmMessageReceivedRequest(
                    node=node, run_id=metadata.run_id, message_object_id=metadata.message_id
                )
            )
        return Question(metadata.message_id, metadata.run_id, metadata.created_at, metadata.ttl, received, content)

    def reply(self, question: Question, content: Content) -> None:
        """Answer a message. Times are reckoned on the Aggregator's clock, so that this one may be wrong."""
        node, ours, theirs = self._joined(), self._joined().node_id, flower.SUPERLINK_NODE_ID
        elapsed_s = time.monotonic() - question.received
        created_at, ttl_s = question.created_at + elapsed_s, max(0.001, question.ttl_s - elapsed_s)
        metadata = flower.Metadata(
            question.run_id, "", ours, theirs, question.message_id, "", created_at, ttl_s, flower.MESSAGE_TYPE
        )
        with failures("answer"), flower.no_object_id_recompute():
            message = flower.new_message(metadata, content)
            response = self._client.PushMessages(
                flower.PushMessagesRequest(
                    node=node,
                    messages_list=[flower.message_to_proto(flower.remove_content_from_message(message))],
                    message_object_trees=[flower.get_object_tree(message)],
                    clientapp_runtime_list=[0.0],
                )
            )
            push = flower.make_push_object_fn_protobuf(
                self._client.PushObject, node, question.run_id, response.session_id
            )
            wanted = set(response.objects_to_push)
            flower.push_objects(flower.get_all_nested_objects(message), push, object_ids_to_push=wanted)

    def leave(self) -> None:
        """Go offline at once instead of being missed later."""
        if self._node is not None:
            node_id = self._node.node_id
            with failures("leave"):
                _ignore_refusal(lambda: self._client.DeactivateNode(flower.DeactivateNodeRequest(node_id=node_id)))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _activate(self) -> int:
        return int(self._client.ActivateNode(flower.ActivateNodeRequest(heartbeat_interval=HEARTBEAT_S)).node_id)

    def _joined(self) -> flower.Node:
        if self._node is None:
            raise FlowerDownError("this node has not joined yet")
        return self._node


def _ignore_refusal(call: Callable[[], object]) -> None:
    """For calls that may find their work done already; an answer is needed all the same."""
    with suppress(httpx.HTTPStatusError):
        call()
