"""A real SuperLink for tests, and the forwarder of the gateway before it, without TLS: a port for each name."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from photon.fabric.fleet import CallRefusedError, FleetForwarder
from photon.fabric.fleet_client import FleetClient
from photon.fabric.flower_run import FlowerRun
from photon.fabric.flwr_internals import FlowerDownError, flower_environment, superlink_arguments
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
