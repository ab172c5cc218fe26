"""A real SuperLink for tests, and the forwarder of the gateway before it, without TLS: a port for each name."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from photon.fabric.fleet import CallRefusedError, FleetForwarder
from photon.fabric.fleet_client import FleetClient, Question
from photon.fabric.flower_run import FlowerRun
from photon.fabric.flwr_internals import (
    MESSAGE_TYPE,
    SUPERLINK_NODE_ID,
    FlowerDownError,
    Metadata,
    ObjectTree,
    PushMessagesRequest,
    PushObjectRequest,
    failures,
    flower_environment,
    message_to_proto,
    new_message,
    remove_content_from_message,
    superlink_arguments,
)
from photon.fabric.supervise import Child, Supervisor, free_port

SECRET = b"of a test: no key of a run......"
UP_DEADLINE_S = 60.0


class Link:
    """How to reach a SuperLink: as the Aggregator, which starts runs, and as a node, through the forwarder."""

    def __init__(self, port: int, forwarder: FleetForwarder) -> None:
        self.port, self.forwarder = port, forwarder
        self.ports: dict[str, int] = {}

    def run(self) -> FlowerRun:
        """A new run, once the SuperLink is up."""
        end = time.monotonic() + UP_DEADLINE_S
        while True:
            try:
                return FlowerRun(f"127.0.0.1:{self.port}", SECRET)
            except FlowerDownError as error:
                if time.monotonic() > end:
                    raise AssertionError("the SuperLink did not come up") from error
                time.sleep(0.1)

    def node(self, name: str) -> FleetClient:
        """A node's end, not joined yet."""
        return FleetClient(self.url(name), None)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"


@contextmanager
def superlink(folder: Path, names: Sequence[str]) -> Iterator[Link]:
    """A SuperLink of its own with its files in `folder`; `names` are the nodes that may call it."""
    (folder / "secret").write_bytes(SECRET)
    port = free_port()
    arguments = superlink_arguments(port, folder / "superlink.db", folder / "secret")
    command = [sys.executable, "-m", "photon.fabric.superlink", "--", *arguments]
    environment = flower_environment(os.environ, folder / "flower")
    supervisor = Supervisor([Child("superlink", command, folder / "superlink.log", environment)])
    try:
        link = Link(port, FleetForwarder(f"127.0.0.1:{port}", SECRET))
        with _forwarding(link, names):
            yield link
    finally:
        supervisor.close()


@contextmanager
def _forwarding(link: Link, names: Sequence[str]) -> Iterator[None]:
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def open_ports() -> list[web.AppRunner]:
        runners = []
        for name in names:
            app = web.Application()
            app.router.add_post("/v1/fleet/{call}", _handler(link.forwarder, name))
            runners.append(web.AppRunner(app))
            await runners[-1].setup()
            await web.TCPSite(runners[-1], "127.0.0.1", port := free_port()).start()
            link.ports[name] = port
        return runners

    def work() -> None:
        asyncio.set_event_loop(loop)
        runners = loop.run_until_complete(open_ports())
        ready.set()
        loop.run_forever()
        for runner in runners:
            loop.run_until_complete(runner.cleanup())
        loop.run_until_complete(link.forwarder.close())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(UP_DEADLINE_S)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(UP_DEADLINE_S)


def _handler(forwarder: FleetForwarder, name: str) -> web.Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            status, kind, body = await forwarder.forward(name, request.match_info["call"], await request.read())
        except CallRefusedError as error:
            return web.json_response({"error": str(error)}, status=error.status)
        return web.Response(status=status, body=body, headers={"Content-Type": kind})

    return answer


def object_of(kind: str, body: bytes, children: Sequence[bytes] = ()) -> bytes:
    """An object as Flower stores it, of a kind that it knows, with any body and any children."""
    names = ",".join(object_id(child) for child in children)
    return f"{kind} {names} {len(body)}".encode() + b"\x00" + body


def object_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def answer_with(
    client: FleetClient,
    question: Question,
    objects: Sequence[bytes],
    source_id: int | None = None,
    created_at: float | None = None,
) -> None:
    """Answer with any objects, the first of which passes for the message and the others for its parts.

    Goes to Flower as a hostile node could, past all that `FleetClient.reply` would not do. `source_id`: in whose name.
    `created_at`: as if it was made then.
    """
    node, root = client._joined(), object_id(objects[0])
    created_at = question.created_at + 0.001 if created_at is None else created_at
    ttl_s = max(0.001, question.ttl_s - 0.001)
    source = node.node_id if source_id is None else source_id
    metadata = Metadata(
        question.run_id, root, source, SUPERLINK_NODE_ID, question.message_id, "", created_at, ttl_s, MESSAGE_TYPE
    )
    message = remove_content_from_message(new_message(metadata, {}))
    message.metadata.__dict__["_message_id"] = root
    tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=object_id(part)) for part in objects[1:]])
    request = PushMessagesRequest(node=node, messages_list=[message_to_proto(message)], message_object_trees=[tree])
    with failures("push"):
        response = client._client.PushMessages(request)
        for content in objects:
            client._client.PushObject(
                PushObjectRequest(
                    node=node,
                    run_id=question.run_id,
                    object_id=object_id(content),
                    object_content=content,
                    session_id=response.session_id,
                )
            )
