"""The gateway: the one public port of an Aggregator, behind which nothing else can be reached.

TLS 1.3 with client certificates. Every request has an identity, that of its certificate, and may do what that identity
may: ask for the run, download published blobs, upload what a ticket allows, and make the few calls of Flower that
`forward` lets pass. Bytes of blobs go from socket to disk and back in pieces; none is ever in memory whole. Start it
with `python -m photon.fabric.gateway --config FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.config import Name
from photon.errors import FabricError, PhotonError
from photon.fabric.admission import IDENTITY, Admission, RequestRefusedError, read_json
from photon.fabric.fleet import CallRefusedError, FleetForwarder
from photon.fabric.lifeline import end_with
from photon.fabric.traffic import TrafficAccounts
from photon.keys import Identity, server_context
from photon.link.object_store import open_store
from photon.link.partial import BeyondPartError, OffsetError, PartialFile
from photon.link.store import BlobStore, FolderStore

MAX_CALL_BYTES = 256 * 2**10
SILENCE_S = 30.0  # longest wait for a header, or for the next bytes of a body in either direction
FORWARD_S = 60.0
HANDSHAKE_S = 10.0
_PIECE_BYTES = 2**20
_READ_BUFFER_BYTES = 2**18
_LINGER_S = 2.0
_DISK_THREADS = 16  # more than there are uploads that are verified at the same time
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")

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


class _TellingTls(ssl.SSLObject):
    """asyncio closes on a failed handshake without sending the alert that says why; this has it sent first."""

    _failed: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            super().do_handshake()
        except ssl.SSLError as error:
            if "CERTIFICATE" not in (error.reason or ""):
                raise
            self._failed = error
            raise ssl.SSLWantReadError from error  # asyncio sends what is to be sent, and comes back


class Gateway:
    """Answers requests; one object for one run. All methods run in one event loop, waits for the disk in threads."""

    def __init__(self, config: GatewayConfig, store: BlobStore, forward: Forward) -> None:
        self.config, self.store, self.forward = config, store, forward
        self.traffic = TrafficAccounts(config.workspace.parent / "traffic.json", config.nodes)

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

    async def get_blob_data(self, request: web.Request) -> web.StreamResponse:
        """Bytes of a published blob, whole or one range."""
        store = self.store
        body = store.published_file(request.match_info["sha"]) if isinstance(store, FolderStore) else None
        if body is None:
            raise RequestRefusedError(404, "no such blob is published")
        begin, end = _requested_range(request.headers.get("Range"), body.size)
        response = web.StreamResponse(status=206 if "Range" in request.headers else 200)
        response.content_type, response.content_length = "application/octet-stream", end - begin
        if response.status == 206:
            response.headers["Content-Range"] = f"bytes {begin}-{end - 1}/{body.size}"
        with body.path.open("rb", buffering=0) as file:
            await response.prepare(request)
            whole = False
            with suppress(OSError):  # the other end is gone, or silent: there is nobody to tell
                whole = await self._send(response, file.fileno(), (begin, end), request[IDENTITY].name)
        if not whole and request.transport is not None:
            request.transport.abort()
        return response

    async def _send(self, response: web.StreamResponse, file: int, span: tuple[int, int], node: str) -> bool:
        """Send bytes of a file; False if it ends before. Raises TimeoutError, ConnectionError."""
        position, end = span
        async with asyncio.timeout(SILENCE_S) as limit:
            while position < end:
                piece = os.pread(file, min(_PIECE_BYTES, end - position), position)
                if not piece:
                    return False
                await response.write(piece)
                self.traffic.down(node, len(piece))
                position += len(piece)
                limit.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
        return True

    async def post_upload(self, request: web.Request) -> web.Response:
        """Begin an upload, or ask how far it is."""
        try:
            wanted = _UploadRequest.model_validate_json(await _small_body(request))
        except ValidationError:
            raise RequestRefusedError(400, 'expected {"bytes": SIZE}') from None
        node, sha256 = request[IDENTITY].name, request.match_info["sha"]
        location = await asyncio.to_thread(self.store.begin_upload, node, sha256, wanted.bytes)
        return web.Response(text=location.model_dump_json(), content_type="application/json")

    async def put_part(self, request: web.Request) -> web.Response:
        """Take a piece of an upload in, from socket to disk."""
        if not isinstance(self.store, FolderStore):
            raise RequestRefusedError(404, "uploads of this run do not pass the gateway")
        node, index = request[IDENTITY].name, int(request.match_info["part"])
        partial = await asyncio.to_thread(self.store.incoming, node, request.match_info["sha"])
        position = _checked_piece(request, partial, index)
        low = partial.bounds[index][0]
        async with asyncio.timeout(SILENCE_S) as limit:
            while data := await request.content.readany():
                limit.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
                self.traffic.up(node, len(data))
                partial.write(index, position, data)
                position += len(data)
        return web.json_response({"done": position - low})

    async def post_finish(self, request: web.Request) -> web.Response:
        """Verify an upload. It may be asked for again while the first answer is still being worked out."""
        await asyncio.to_thread(self.store.finish_upload, request[IDENTITY].name, request.match_info["sha"])
        return web.json_response({"finished": True})


def create_app(config: GatewayConfig, store: BlobStore, forward: Forward) -> web.Application:
    """The gateway as an aiohttp application; its accounts are kept while it runs. Served by `serving`."""
    gateway = Gateway(config, store, forward)
    app = web.Application(middlewares=[Admission(config.keys, config.nodes).guard], client_max_size=MAX_CALL_BYTES)
    sha = "{sha:[0-9a-f]{64}}"
    app.add_routes(
        [
            web.get("/v1/run", gateway.get_run, allow_head=False),
            web.get("/v1/status", gateway.get_status, allow_head=False),
            web.get(f"/v1/blobs/{sha}", gateway.get_blob, allow_head=False),
            web.get(f"/v1/blobs/{sha}/data", gateway.get_blob_data, allow_head=False),
            web.post(f"/v1/uploads/{sha}", gateway.post_upload),
            web.post(f"/v1/uploads/{sha}/finish", gateway.post_finish),
            web.put(f"/v1/uploads/{sha}/{{part:[0-9]{{1,5}}}}", gateway.put_part),
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
    context.sslobject_class = _TellingTls
    runner = web.AppRunner(
        create_app(config, store, forward),
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
        # Not a site of aiohttp's: those set no deadline for the handshake.
        server = await asyncio.get_running_loop().create_server(
            runner.server, config.host, config.port, ssl=context, ssl_handshake_timeout=HANDSHAKE_S, backlog=256
        )
        host, port = server.sockets[0].getsockname()[:2]
        try:
            yield host, port
        finally:
            server.close()
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


def _requested_range(header: str | None, size: int) -> tuple[int, int]:
    """(begin, end) of the one range that is asked for, all without a header. Raises RequestRefusedError."""
    if header is None:
        return 0, size
    match = _RANGE.fullmatch(header)
    if match is None:
        raise RequestRefusedError(416, "expected one range, bytes=BEGIN-LAST")
    begin, last = int(match[1]), int(match[2] or size - 1)
    if not begin <= last or begin >= size:
        raise RequestRefusedError(416, f"the blob has {size} bytes")
    return begin, min(last + 1, size)


def _checked_piece(request: web.Request, partial: PartialFile, index: int) -> int:
    """Where the piece begins that a PUT brings. Raises RequestRefusedError, OffsetError, BeyondPartError."""
    match = _CONTENT_RANGE.fullmatch(request.headers.get("Content-Range", ""))
    if match is None:
        raise RequestRefusedError(400, "expected Content-Range: bytes BEGIN-LAST/TOTAL")
    begin, last, total = (int(number) for number in match.groups())
    if request.content_length is None:
        raise RequestRefusedError(411, "expected a Content-Length")
    if last < begin or request.content_length != last + 1 - begin:
        raise RequestRefusedError(400, "Content-Range and Content-Length do not agree")
    if index >= len(partial.bounds) or total != partial.size:
        raise RequestRefusedError(404, f"the upload has {partial.size} bytes in {len(partial.bounds)} parts")
    low, high = partial.bounds[index]
    done = partial.done()[index]
    if begin < low or last >= high:
        raise BeyondPartError(f"part {index} is of bytes {low} to {high}")
    if begin != low + done:
        raise OffsetError(f"part {index} goes on at byte {low + done}", done)
    return begin


if __name__ == "__main__":
    main()
