"""Gateways for tests: with real keys and TLS, in a thread of the test or in a process of their own."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256 as _sha256
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

from photon.fabric.gateway import GatewayConfig, serving
from photon.identity import Identity, client_context
from photon.keys import create_authority, issue_node
from photon.link.client import GatewayClient
from photon.link.store import FolderStore

NODES = ["ada", "bob"]
STATUS = {"run": "r", "round": 3, "secret": "plan", "nodes": {"ada": {"loss": 1.0}, "bob": {"loss": 2.0}}}
DEADLINE_S = 20.0


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return _sha256(data).hexdigest()


async def echo(identity: Identity, call: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str, bytes]:
    """Stands for Flower: says who called what."""
    return 200, "application/x-echo", b"|".join([identity.name.encode(), call.encode(), body])


class Site:
    """The folder of an Aggregator with keys for ada, bob and the stranger carol, and how to reach its gateway."""

    def __init__(self, root: Path) -> None:
        self.root, self.keys = root, root / "keys"
        create_authority(self.keys)
        for name in (*NODES, "carol"):
            issue_node(self.keys, name)
        (root / "run.json").write_text(json.dumps({"run": "r", "recipe": "x = 1"}))
        (root / "status.json").write_text(json.dumps(STATUS))
        self.store = FolderStore(root / "store")
        self.port = 0

    @property
    def config(self) -> GatewayConfig:
        return GatewayConfig(
            host="127.0.0.1",
            port=self.port,
            keys=self.keys,
            workspace=self.root / "store",
            nodes=NODES,
            run_file=self.root / "run.json",
            status_file=self.root / "status.json",
            superlink_port=1,
            fleet_secret_file=self.root / "secret",
        )

    def client(self, name: str = "ada", port: int = 0, timeout_s: float = DEADLINE_S) -> GatewayClient:
        context = client_context(self.keys / f"{name}.key")
        return GatewayClient(f"https://127.0.0.1:{port or self.port}", context, timeout_s)

    def traffic(self) -> dict[str, dict[str, int]]:
        """The accounts in the file, up to a second old; exact once the gateway has ended."""
        path = self.root / "traffic.json"
        accounts: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
        return accounts


@contextmanager
def in_thread(site: Site) -> Iterator[None]:
    """Serve from a thread of this process; `site.port` is where."""
    ready = threading.Event()
    ends: list[Callable[[], object]] = []

    async def run() -> None:
        stop = asyncio.Event()
        ends.append(partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set))
        async with serving(site.config, FolderStore(site.root / "store"), echo) as (_, site.port):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield
    finally:
        ends[0]()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        site.port = 0


@contextmanager
def in_process(site: Site, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The real command, on `site.port` again if it has one; it is killed at the end if it still runs."""
    (site.root / "secret").write_bytes(b"s" * 32)
    config = site.root / "gateway.json"
    config.write_text(site.config.model_dump_json())
    command = [sys.executable, "-m", "photon.fabric.gateway", "--config", str(config), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on 127.0.0.1:")
            site.port = int(line.rsplit(":", 1)[1])
            yield process
        finally:
            process.kill()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.body)
        return answer


def connect(site: Site, name: str = "ada") -> HTTPSConnection:
    return HTTPSConnection(
        "127.0.0.1", site.port, timeout=DEADLINE_S, context=client_context(site.keys / f"{name}.key")
    )


def ask(site: Site, method: str, path: str, body: bytes = b"", name: str = "ada", **headers: str) -> Answer:
    with closing(connect(site, name)) as connection:
        return ask_over(connection, method, path, body, **headers)


def ask_over(connection: HTTPSConnection, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
    response = connection.getresponse()
    return Answer(response.status, dict(response.headers), response.read())


def raw(site: Site, data: bytes, name: str = "ada") -> bytes:
    """What comes back for these very bytes, until the gateway closes."""
    context = client_context(site.keys / f"{name}.key")
    with (
        socket.create_connection(("127.0.0.1", site.port), timeout=DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        received = b""
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                received += piece
        except (ConnectionError, ssl.SSLError):
            pass
        return received


def allow(site: Site, node: str, size: int) -> None:
    site.store.allow(node, size, time.time() + 600)


def begin(site: Site, sha: str, size: int, name: str = "ada") -> Answer:
    return ask(site, "POST", f"/v1/uploads/{sha}", json.dumps({"bytes": size}).encode(), name)


def put(site: Site, data: bytes, offset: int, total: int, sha: str, part: str = "0", **headers: str) -> Answer:
    span = f"bytes {offset}-{offset + len(data) - 1}/{total}"
    return ask(site, "PUT", f"/v1/uploads/{sha}/{part}", data, **({"Content_Range": span} | headers))


def finish(site: Site, sha: str) -> Answer:
    return ask(site, "POST", f"/v1/uploads/{sha}/finish")
