"""Which calls of Flower pass the gateway, and in whose name.

A node proves who it is with its certificate. Flower knows its nodes by keys, so the gateway holds one for every name,
derived from a secret of its own, and signs each call with the key of the certificate's name. The SuperLink then refuses
whoever speaks for another node's id. Clocks of nodes do not matter, and no node holds a key of Flower's.

Calls that fetch code, and everything that is not Flower's fleet API, do not pass.
"""

from __future__ import annotations

import hmac
import math
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from hashlib import sha512
from itertools import islice

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from photon.errors import PhotonError
from photon.fabric import flwr_internals as flower

MAX_CALL_BYTES = 256 * 1024
MAX_OBJECTS = 16  # that an answer is made of; it has three
# What a node may push: an answer has a few thousand bytes and there is one a second at most. The SuperLink keeps what
# it is sent until the run ends, and its disk is the Aggregator's.
PUSH_BYTES_PER_S = 16 * 1024
PUSH_BYTES_AT_ONCE = 2 * 2**20
_P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)
_CALLS = {
    "register-node": flower.RegisterNodeFleetRequest,
    "activate-node": flower.ActivateNodeRequest,
    "deactivate-node": flower.DeactivateNodeRequest,
    "send-node-heartbeat": flower.SendNodeHeartbeatRequest,
    "pull-messages": flower.PullMessagesRequest,
    "push-messages": flower.PushMessagesRequest,
    "push-object": flower.PushObjectRequest,
    "pull-object": flower.PullObjectRequest,
    "confirm-message-received": flower.ConfirmMessageReceivedRequest,
}


class CallRefusedError(PhotonError):
    """A fleet call that this node may not make; `status` is the HTTP status to answer with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NodeKeys:
    """The keys by which Flower knows the nodes: a pure function of (secret, name)."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._private: dict[str, ec.EllipticCurvePrivateKey] = {}

    def private(self, name: str) -> ec.EllipticCurvePrivateKey:
        """The signing key of a name, on Flower's curve P-384."""
        if name not in self._private:
            number = int.from_bytes(hmac.digest(self._secret, b"photon flower key " + name.encode(), sha512))
            self._private[name] = ec.derive_private_key(1 + number % (_P384_ORDER - 1), ec.SECP384R1())
        return self._private[name]

    def public(self, name: str) -> bytes:
        """The public key of a name as Flower writes it."""
        return bytes(flower.public_key_to_bytes(self.private(name).public_key()))


class PushBudget:
    """How many bytes one node may push now: so many a second, of which a few minutes' worth may come at once."""

    def __init__(self, now: float) -> None:
        self._left, self._at = float(PUSH_BYTES_AT_ONCE), now

    def spend(self, count: int, now: float) -> None:
        """Take `count` bytes off, at `now` (monotonic seconds). Raises CallRefusedError if there are not so many."""
        self._left = min(PUSH_BYTES_AT_ONCE, self._left + PUSH_BYTES_PER_S * max(0.0, now - self._at))
        self._at = now
        if count > self._left:
            raise CallRefusedError("this node has pushed more bytes than its answers can have: wait", 429)
        self._left -= count


class FleetForwarder:
    """Hands checked calls to the SuperLink on loopback."""

    def __init__(self, superlink: str, secret: bytes) -> None:
        self._keys = NodeKeys(secret)
        self._budgets: dict[str, PushBudget] = {}
        self._url = f"http://{superlink}/v1/fleet/"
        self._client = httpx.AsyncClient(timeout=flower.CALL_TIMEOUT_S, trust_env=False)  # no proxy on the loopback

    async def forward(self, name: str, call: str, body: bytes) -> tuple[int, str, bytes]:
        """(status, content type, body) of Flower's answer to a node's call. Raises CallRefusedError."""
        checked = check_call(call, body, self._keys.public(name))
        if call.startswith("push-"):
            now = time.monotonic()
            self._budgets.setdefault(name, PushBudget(now)).spend(len(checked), now)
        try:
            answer = await self._client.post(self._url + call, content=checked, headers=self._headers(name))
        except httpx.HTTPError as error:
            raise CallRefusedError(f"the SuperLink does not answer ({type(error).__name__}); try again", 503) from error
        return answer.status_code, answer.headers.get("content-type", flower.PROTOBUF_MEDIA_TYPE), answer.content

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _headers(self, name: str) -> Mapping[str, str]:
        timestamp = flower.now().isoformat()
        signature = flower.sign_message(self._keys.private(name), timestamp.encode("ascii"))
        return {
            "content-type": flower.PROTOBUF_MEDIA_TYPE,
            "accept": flower.PROTOBUF_MEDIA_TYPE,
            flower.FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self._keys.public(name)).decode("ascii"),
            flower.TIMESTAMP_HEADER: timestamp,
            flower.FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
        }


def check_call(call: str, body: bytes, public_key: bytes) -> bytes:
    """The call as it may go on, in the name of `public_key`. Raises CallRefusedError.

    Whether the node id in it is that of the key is checked by the SuperLink; who a message says it is from, and what
    else is registered with it, the SuperLink does not check, so that is done here.
    """
    if call not in _CALLS:
        raise CallRefusedError(f"{call!r} is no call that a node may make", 404)
    if len(body) > MAX_CALL_BYTES:
        raise CallRefusedError(f"a call of {len(body)} bytes; {MAX_CALL_BYTES} are allowed", 413)
    request = _CALLS[call]()
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise CallRefusedError(f"the body is no {call} request", 400) from error
    if isinstance(request, flower.RegisterNodeFleetRequest | flower.ActivateNodeRequest):
        request.public_key = public_key
    if isinstance(request, flower.PushMessagesRequest):
        _check_answer(request)
    return bytes(request.SerializeToString(deterministic=True))


def _check_answer(request: flower.PushMessagesRequest) -> None:
    """One message, from the node that calls, of a few objects that belong to it. Raises CallRefusedError."""
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise CallRefusedError("one message at a time", 400)
    metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    if metadata.src_node_id != request.node.node_id:
        raise CallRefusedError("the message names another sender than the call", 403)
    if not metadata.reply_to_message_id:
        raise CallRefusedError("a node only answers", 403)
    if not (math.isfinite(metadata.created_at) and math.isfinite(metadata.ttl)):
        # The SuperLink keeps NaN as nothing, and then fails at every answer that is fetched together with this one.
        raise CallRefusedError("the message has a time that is no number", 400)
    if tree.object_id != metadata.message_id:
        raise CallRefusedError("the message announces the objects of another one", 400)
    if len(list(islice(_objects(tree), MAX_OBJECTS + 1))) > MAX_OBJECTS:
        raise CallRefusedError(f"an answer of more than {MAX_OBJECTS} objects", 413)


def _objects(tree: flower.ObjectTree) -> Iterator[flower.ObjectTree]:
    yield tree
    for child in tree.children:
        yield from _objects(child)
