"""What passes the gateway to Flower, in whose name, and how much of it."""

from __future__ import annotations

import asyncio
import math
from base64 import b64decode
from collections.abc import Awaitable, Callable
from datetime import datetime

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import example, given
from hypothesis import strategies as st

from photon.fabric import flwr_internals as flower
from photon.fabric.fleet import (
    MAX_CALL_BYTES,
    MAX_OBJECTS,
    PUSH_BYTES_AT_ONCE,
    PUSH_BYTES_PER_S,
    CallRefusedError,
    FleetForwarder,
    NodeKeys,
    PushBudget,
    check_call,
)
from photon.fabric.supervise import free_port

KEY = NodeKeys(b"s" * 32).public("ada")
CALLS = {
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
ROOT = "a" * 64


def answer(
    *,
    node: int = 7,
    source: int = 7,
    to: str = "q",
    messages: int = 1,
    trees: int = 1,
    root: str = ROOT,
    parts: int = 2,
    depth: int = 1,
    created_at: float = 1.0,
    ttl_s: float = 1.0,
) -> flower.PushMessagesRequest:
    """A request to push an answer; only what the gateway looks at is in it."""
    request = flower.PushMessagesRequest(node=flower.Node(node_id=node))
    for _ in range(messages):
        metadata = request.messages_list.add().metadata
        metadata.src_node_id, metadata.reply_to_message_id, metadata.message_id = source, to, ROOT
        metadata.created_at, metadata.ttl = created_at, ttl_s
    for _ in range(trees):
        tree = request.message_object_trees.add(object_id=root)
        for _ in range(depth - 1):
            tree = tree.children.add(object_id="c" * 64)
        for part in range(parts):
            tree.children.add(object_id=f"{part:064x}")
    return request


def refusal(call: str, body: bytes) -> int:
    with pytest.raises(CallRefusedError) as caught:
        check_call(call, body, KEY)
    return caught.value.status


def test_an_answer_of_a_node_passes_unchanged() -> None:
    request = answer()
    checked = flower.PushMessagesRequest.FromString(check_call("push-messages", request.SerializeToString(), KEY))
    assert checked == request


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (answer(source=8), 403),  # another node's name
        (answer(source=flower.SUPERLINK_NODE_ID), 403),  # the Aggregator's
        (answer(source=0), 403),
        (answer(node=0), 403),
        (answer(to=""), 403),  # not an answer but a question of its own
        (answer(messages=0), 400),
        (answer(messages=2), 400),
        (answer(trees=0), 400),
        (answer(trees=2), 400),
        (answer(root="b" * 64), 400),  # parts of a message that was answered before, or of another node's
        (answer(parts=MAX_OBJECTS), 413),
        (answer(parts=0, depth=MAX_OBJECTS + 1), 413),
        (answer(parts=3000), 413),
        (answer(created_at=math.nan), 400),  # with it the SuperLink fails at everybody's answers
        (answer(ttl_s=math.nan), 400),
        (answer(created_at=-math.inf, ttl_s=math.inf), 400),
    ],
)
def test_an_answer_in_another_name_or_of_too_many_parts_is_refused(
    request_: flower.PushMessagesRequest, status: int
) -> None:
    assert refusal("push-messages", request_.SerializeToString()) == status


def test_as_many_parts_as_are_allowed_pass() -> None:
    for request in (answer(parts=MAX_OBJECTS - 1), answer(parts=0, depth=MAX_OBJECTS)):
        check_call("push-messages", request.SerializeToString(), KEY)


@pytest.mark.parametrize("call", ["register-node", "activate-node"])
@pytest.mark.parametrize("claimed", [b"", b"another node's key", KEY])
def test_a_node_registers_with_the_key_of_its_certificate_whatever_it_says(call: str, claimed: bytes) -> None:
    body = CALLS[call](public_key=claimed).SerializeToString()
    assert CALLS[call].FromString(check_call(call, body, KEY)).public_key == KEY


@pytest.mark.parametrize("call", ["get-fab", "get-run", "unregister-node", "", "pull-messages/", "Pull-Messages", "."])
def test_calls_that_are_not_named_do_not_pass(call: str) -> None:
    assert refusal(call, b"") == 404


@pytest.mark.parametrize("call", CALLS)
def test_a_call_has_a_largest_size(call: str) -> None:
    assert refusal(call, bytes(MAX_CALL_BYTES + 1)) == 413


@given(st.sampled_from(sorted(CALLS)), st.binary(max_size=300))
@example("push-messages", b"\x1a" * 200 + b"\x00")  # nested as deep as it goes
@example("push-messages", answer().SerializeToString()[:-3])
def test_junk_is_refused_or_becomes_a_request_of_that_call(call: str, body: bytes) -> None:
    try:
        checked = check_call(call, body, KEY)
    except CallRefusedError as error:
        assert error.status in (400, 403, 413)
        return
    request = CALLS[call].FromString(checked)
    assert request.SerializeToString(deterministic=True) == checked
    if call == "push-messages":
        (message,), (tree,) = request.messages_list, request.message_object_trees
        assert message.metadata.src_node_id == request.node.node_id
        assert tree.object_id == message.metadata.message_id
    if call in ("register-node", "activate-node"):
        assert request.public_key == KEY


@given(st.integers(0, 400), st.integers(0, 255))
def test_one_changed_byte_makes_no_other_sender(place: int, value: int) -> None:
    body = bytearray(answer().SerializeToString())
    body[place % len(body)] = value
    try:
        request = flower.PushMessagesRequest.FromString(check_call("push-messages", bytes(body), KEY))
    except CallRefusedError:
        return
    assert {message.metadata.src_node_id for message in request.messages_list} == {request.node.node_id}


# How much


def test_a_node_may_push_so_much_at_once_and_then_so_much_a_second() -> None:
    budget = PushBudget(now=100.0)
    budget.spend(PUSH_BYTES_AT_ONCE, 100.0)
    with pytest.raises(CallRefusedError, match="wait") as caught:
        budget.spend(1, 100.0)
    assert caught.value.status == 429
    budget.spend(PUSH_BYTES_PER_S, 101.0)
    with pytest.raises(CallRefusedError):
        budget.spend(PUSH_BYTES_PER_S + 1, 102.0)
    budget.spend(PUSH_BYTES_PER_S, 102.0)  # what was refused was not taken off
    budget.spend(PUSH_BYTES_AT_ONCE, 1e9)  # what is not used is not kept for ever
    with pytest.raises(CallRefusedError):
        budget.spend(PUSH_BYTES_PER_S, 1e9)


@given(st.lists(st.tuples(st.integers(0, PUSH_BYTES_AT_ONCE), st.floats(0, 1000)), max_size=30))
def test_nobody_pushes_more_than_the_rate_allows(steps: list[tuple[int, float]]) -> None:
    budget, now, passed = PushBudget(now=0.0), 0.0, 0
    for count, pause_s in steps:
        now += pause_s
        try:
            budget.spend(count, now)
        except CallRefusedError:
            continue
        passed += count
        assert passed <= PUSH_BYTES_AT_ONCE + PUSH_BYTES_PER_S * now + 1


# In whose name


def test_keys_follow_from_secret_and_name_alone() -> None:
    keys, again, other = NodeKeys(b"s" * 32), NodeKeys(b"s" * 32), NodeKeys(b"t" * 32)
    assert keys.public("ada") == again.public("ada")
    assert len({keys.public("ada"), keys.public("bob"), other.public("ada")}) == 3
    assert isinstance(keys.private("ada").curve, ec.SECP384R1)


Asked = list[tuple[str, dict[str, str], bytes]]


def forwarded(status: int, steps: Callable[[FleetForwarder, Asked], Awaitable[None]]) -> Asked:
    """What a stub of the SuperLink is asked, when `steps` are taken with a forwarder to it."""
    asked: Asked = []

    async def take(request: web.Request) -> web.Response:
        asked.append((request.path, dict(request.headers), await request.read()))
        return web.Response(status=status, body=b"said", content_type="application/x-protobuf")

    async def run() -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", take)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port := free_port()).start()
        forwarder = FleetForwarder(f"127.0.0.1:{port}", b"s" * 32)
        try:
            await steps(forwarder, asked)
        finally:
            await forwarder.close()
            await runner.cleanup()

    asyncio.run(run())
    return asked


def test_a_call_is_signed_with_the_key_of_the_name_and_its_answer_handed_back() -> None:
    body = flower.PullMessagesRequest(node=flower.Node(node_id=7)).SerializeToString()

    async def steps(forwarder: FleetForwarder, asked: Asked) -> None:
        assert await forwarder.forward("ada", "pull-messages", body) == (418, "application/x-protobuf", b"said")

    ((path, headers, sent),) = forwarded(418, steps)
    assert (path, sent) == ("/v1/fleet/pull-messages", body)
    headers = {key.lower(): value for key, value in headers.items()}
    key = b64decode(headers[flower.FLEET_HTTP_PUBLIC_KEY_HEADER.lower()])
    assert key == KEY
    timestamp = headers[flower.TIMESTAMP_HEADER.lower()]
    assert abs((flower.now() - datetime.fromisoformat(timestamp)).total_seconds()) < 60
    public = load_pem_public_key(key)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    signature = b64decode(headers[flower.FLEET_HTTP_SIGNATURE_HEADER.lower()])
    public.verify(signature, timestamp.encode(), ec.ECDSA(hashes.SHA256()))


def test_a_proxy_of_the_environment_is_not_asked_for_the_way_to_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")

    async def steps(forwarder: FleetForwarder, asked: Asked) -> None:
        await forwarder.forward("ada", "pull-messages", b"")

    assert len(forwarded(200, steps)) == 1


def test_what_is_refused_does_not_reach_the_superlink_and_each_name_has_its_own_budget() -> None:
    push = flower.PushObjectRequest(object_content=bytes(MAX_CALL_BYTES - 100)).SerializeToString()

    async def steps(forwarder: FleetForwarder, asked: Asked) -> None:
        for call, body in (("get-fab", b""), ("push-messages", answer(source=8).SerializeToString())):
            with pytest.raises(CallRefusedError):
                await forwarder.forward("ada", call, body)
        assert asked == []
        with pytest.raises(CallRefusedError, match="wait"):
            for _ in range(100):
                await forwarder.forward("ada", "push-object", push)
        assert len(asked) in (8, 9)  # 2 MiB of 256 KiB, and perhaps what the time since has brought
        await forwarder.forward("bob", "push-object", push)
        await forwarder.forward("ada", "pull-messages", b"")  # asking costs nothing

    forwarded(200, steps)


def test_a_superlink_that_is_gone_is_said_to_be_worth_another_try() -> None:
    async def run() -> None:
        forwarder = FleetForwarder(f"127.0.0.1:{free_port()}", b"s" * 32)
        with pytest.raises(CallRefusedError, match="try again") as caught:
            await forwarder.forward("ada", "pull-messages", b"")
        assert caught.value.status == 503
        await forwarder.close()

    asyncio.run(run())
