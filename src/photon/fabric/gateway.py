"""The gateway: the one public port of an Aggregator, behind which nothing else can be reached.

TLS 1.3 with client certificates. Every request has an identity, that of its certificate, and may do what that identity
may: ask for the run, download published blobs, upload what a ticket allows, and make the few calls of Flower that
`forward` lets pass. Bytes of blobs go from socket to disk and back in pieces, in `photon.fabric.blobs`; none is ever in
memory whole. Start it with `python -m photon.fabric.gateway --config FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.config import Name
from photon.errors import FabricError, PhotonError
from photon.fabric.admission import IDENTITY, Admission, RequestRefusedError, read_json
from photon.fabric.blobs import BlobServer
from photon.fabric.door import Door
from photon.fabric.fleet import CallRefusedError, FleetForwarder
from photon.fabric.lifeline import end_with
from photon.fabric.traffic import TrafficAccounts
from photon.fabric.transport import Patience
from photon.identity import Identity, server_context
from photon.link.object_store import open_store
from photon.link.store import BlobStore, FolderStore

MAX_CALL_BYTES = 256 * 2**10
SILENCE_S = 30.0  # longest wait for a header, or for the next bytes of a body
FORWARD_S = 60.0
HANDSHAKE_S = 10.0
_READ_BUFFER_BYTES = 2**18
_LINGER_S = 2.0
_DISK_THREADS = 16  # more than there are uploads that are verified at the same time

Forward = Callable[[Identity, str, bytes, Mapping[str, str]], Awaitable[tuple[int, str, bytes]]]


class GatewayConfig(BaseModel):
    """What a gateway needs to know; written by the Aggregator's process for its own gateway."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "0.0.0.0"  # noqa: S104  # to be reached from other machines is what it is for
    port: int = Field(ge=0, le=65535, description="0: any free one; it is printed.")
    keys: Path = Field(description="Folder of the authority (`photon keys init`).")
    store: str = Field("", description='Where blobs are: "" (in the workspace), file:///PATH, or s3://, gs://, az://.')
    workspace: Path = Field(description="Own folder of the store; traffic.json is written beside it.")
    nodes: list[Name] = Field(description="Who takes part in this run.")
    run_file: Path = Field(description="JSON that describes the run to nodes.")
    status_file: Path = Field(description="JSON of how far the run is; nodes see their own entry.")
    superlink_port: int = Field(ge=1, le=65535, description="Of Flower's SuperLink on 127.0.0.1.")
    fleet_secret_file: Path = Field(description="Secret from which the nodes' keys at the SuperLink are derived.")


class _UploadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: int = Field(ge=0, lt=2**60)


def visible_status(identity: Identity, status: Mapping[str, Any]) -> dict[str, Any]:
    """What an identity may see of a run's status: an operator all, a node the round and its own entry."""
    if identity.role == "operator":
        return dict(status)
    nodes = status.get("nodes", {})
    own = {name: entry for name, entry in nodes.items() if name == identity.name}
    return {key: status[key] for key in ("run", "round") if key in status} | {"nodes": own}


class Gateway:
    """Answers requests; one object for one run. All methods run in one event loop, waits for the disk in threads."""

    def __init__(self, config: GatewayConfig, store: BlobStore, forward: Forward) -> None:
        self.config, self.store, self.forward = config, store, forward
        self.traffic = TrafficAccounts(config.workspace.parent / "traffic.json", config.nodes)
        self.admission = Admission(config.keys, config.nodes)

    # The run

    async def get_run(self, request: web.Request) -> web.Response:
        """The run's description, as it is."""
        return web.json_response(read_json(self.config.run_file))

    async def get_status(self, request: web.Request) -> web.Response:
        """How far the run is, as far as the asker may see it."""
        status = read_json(self.config.status_file)
        if not isinstance(status, dict):
            raise RequestRefusedError(503, "the run has no status yet")
        return web.json_response(visible_status(request[IDENTITY], status))

    async def post_call(self, request: web.Request) -> web.Response:
        """One call of Flower's fleet API."""
        body = await _small_body(request)
        async with asyncio.timeout(FORWARD_S):
            call = request.match_info["call"]
            status, content_type, answer = await self.forward(request[IDENTITY], call, body, request.headers)
        return web.Response(status=status, body=answer, headers={"Content-Type": content_type})

    # Blobs

    async def get_blob(self, request: web.Request) -> web.Response:
        """Where a published blob is."""
        location = await asyncio.to_thread(self.store.locate, request.match_info["sha"])
        if location is None:
            raise RequestRefusedError(404, "no such blob is published")
        return web.Response(text=location.model_dump_json(), content_type="application/json")

    async def refer(self, request: web.Request) -> web.Response:
        """Bytes of blobs, asked for on a connection that began with something else."""
        raise RequestRefusedError(421, "ask for bytes of blobs on a connection of their own")

    async def post_upload(self, request: web.Request) -> web.Response:
        """Begin an upload, or ask how far it is."""
        try:
            wanted = _UploadRequest.model_validate_json(await _small_body(request))
        except ValidationError:
            raise RequestRefusedError(400, 'expected {"bytes": SIZE}') from None
        node, sha256 = request[IDENTITY].name, request.match_info["sha"]
        location = await asyncio.to_thread(self.store.begin_upload, node, sha256, wanted.bytes)
        return web.Response(text=location.model_dump_json(), content_type="application/json")

    async def post_finish(self, request: web.Request) -> web.Response:
        """Verify an upload. It may be asked for again while the first answer is still being worked out."""
        await asyncio.to_thread(self.store.finish_upload, request[IDENTITY].name, request.match_info["sha"])
        return web.json_response({"finished": True})


def create_app(gateway: Gateway) -> web.Application:
    """All of the gateway but bytes of blobs, as an aiohttp application; its accounts are kept while it runs."""
    app = web.Application(middlewares=[gateway.admission.guard], client_max_size=MAX_CALL_BYTES)
    sha = "{sha:[0-9a-f]{64}}"
    app.add_routes(
        [
            web.get("/v1/run", gateway.get_run, allow_head=False),
            web.get("/v1/status", gateway.get_status, allow_head=False),
            web.get(f"/v1/blobs/{sha}", gateway.get_blob, allow_head=False),
            web.get(f"/v1/blobs/{sha}/data", gateway.refer, allow_head=False),
            web.post(f"/v1/uploads/{sha}", gateway.post_upload),
            web.post(f"/v1/uploads/{sha}/finish", gateway.post_finish),
            web.put(f"/v1/uploads/{sha}/{{part:[0-9]{{1,5}}}}", gateway.refer),
            web.post("/v1/fleet/{call:[a-z0-9-]{1,64}}", gateway.post_call),
        ]
    )

    async def accounts(app: web.Application) -> AsyncIterator[None]:
        saver = asyncio.create_task(gateway.traffic.keep_saving())
        yield
        saver.cancel()
        gateway.traffic.save()

    app.cleanup_ctx.append(accounts)
    return app


@asynccontextmanager
async def serving(config: GatewayConfig, store: BlobStore, forward: Forward) -> AsyncIterator[tuple[str, int]]:
    """Accept connections while the block runs; yields host and port. Raises InputError if the keys cannot be used."""
    context = server_context(config.keys)
    gateway = Gateway(config, store, forward)
    runner = web.AppRunner(
        create_app(gateway),
        access_log=None,
        keepalive_timeout=SILENCE_S,
        lingering_time=_LINGER_S,
        read_bufsize=_READ_BUFFER_BYTES,
        auto_decompress=False,
        shutdown_timeout=_LINGER_S,
    )
    await runner.setup()
    try:
        if runner.server is None:
            raise FabricError("the gateway's server was not made")
        blobs = BlobServer(store, gateway.admission, gateway.traffic)
        patience = Patience(HANDSHAKE_S, SILENCE_S, _LINGER_S)
        door = Door(context, runner.server, blobs, gateway.traffic, patience)
        try:
            async with door.open(config.host, config.port) as place:
                yield place
        finally:
            await runner.server.shutdown(_LINGER_S)
            await door.close()
    finally:
        await runner.cleanup()
        if isinstance(store, FolderStore):
            await asyncio.to_thread(store.close)


def main() -> None:
    """Entry point of `python -m photon.fabric.gateway`."""
    parser = argparse.ArgumentParser(description="the public port of an Aggregator; started by it")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--socket", type=int, help="ends when the other end of this inherited socket is closed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # not a line for every call that is forwarded
    logging.getLogger("aiohttp.server").setLevel(
        logging.CRITICAL
    )  # nor a traceback for whatever is no HTTP: that is a 400
    if arguments.socket is not None:
        os.set_inheritable(arguments.socket, False)
        end_with(arguments.socket)
    try:
        config = GatewayConfig.model_validate_json(arguments.config.read_bytes())
        asyncio.run(_serve_run(config))
    except PhotonError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except (OSError, ValidationError) as error:
        sys.exit(f"the gateway cannot be started with {arguments.config}: {error}")


async def _serve_run(config: GatewayConfig) -> None:
    forwarder = FleetForwarder(f"127.0.0.1:{config.superlink_port}", config.fleet_secret_file.read_bytes())

    async def forward(identity: Identity, call: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str, bytes]:
        try:
            return await forwarder.forward(identity.name, call, body)
        except CallRefusedError as error:
            raise RequestRefusedError(error.status, str(error)) from None

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.set_default_executor(ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="photon-gateway"))
    try:
        store = await asyncio.to_thread(open_store, config.store, config.workspace)
        async with serving(config, store, forward) as (host, port):
            print(f"listening on {host}:{port}", flush=True)
            await stop.wait()
    finally:
        await forwarder.close()


async def _small_body(request: web.Request) -> bytes:
    """At most MAX_CALL_BYTES. Raises HTTPRequestEntityTooLarge, TimeoutError."""
    async with asyncio.timeout(SILENCE_S):
        return await request.read()


if __name__ == "__main__":
    main()
