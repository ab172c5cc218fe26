"""What tests of a bucket share: an S3 endpoint on this machine, two stores over it, and what a node can do by HTTP."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from photon.link.body import FileBody
from photon.link.client import GatewayClient
from photon.link.object_store import ObjectStore
from photon.link.store import Location, Part

_missing = [name for name in ("obstore", "moto", "flask") if importlib.util.find_spec(name) is None]
needs_bucket = pytest.mark.skipif(
    bool(_missing), reason=f"not installed: {', '.join(_missing)} (extras objects and dev)"
)

KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
PART = 2**16
# Ends with this process, whatever becomes of it: then its standard input is closed.
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def endpoint() -> Iterator[str]:
    """An S3 server on this machine with an empty bucket called `bucket`; its URL."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            address = f"127.0.0.1:{int(process.stdout.readline())}"
            connection = http.client.HTTPConnection(address, timeout=20)
            connection.request("PUT", "/bucket")
            assert connection.getresponse().status == 200
            yield f"http://{address}"
        finally:
            process.kill()


@dataclass
class Made:
    """Two stores over one bucket and one workspace, as the round loop and the gateway have them."""

    url: str
    workspace: Path
    loop: ObjectStore = field(init=False)
    gateway: ObjectStore = field(init=False)

    def __post_init__(self) -> None:
        self.loop, self.gateway = self.store(), self.store()

    def store(self, **options: Any) -> ObjectStore:
        return ObjectStore(self.url, self.workspace, **{"part_bytes": PART, "allow_http": True, **options})

    def keys(self, folder: str = "") -> dict[str, int]:
        """What lies in the bucket, without the prefix of the run."""
        return self.loop._bucket.sizes(folder)

    def allow(self, node: str, max_bytes: int = 2**30) -> None:
        self.loop.allow(node, max_bytes, time.time() + 600)

    def uploaded(self, node: str, body: bytes) -> str:
        """Have a node upload a body; its sha256."""
        self.allow(node)
        send(self.gateway.begin_upload(node, sha256_of(body), len(body)), body)
        self.gateway.finish_upload(node, sha256_of(body))
        return sha256_of(body)


def sha256_of(body: bytes | memoryview) -> str:
    return hashlib.sha256(body).hexdigest()


def ask(method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """What anybody can do with a URL: no library, no credentials."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    try:
        connection.request(method, f"{parts.path}?{parts.query}", body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def put(part: Part, data: bytes) -> None:
    assert ask("PUT", part.url, data)[0] == 200


def send(location: Location, body: bytes) -> int:
    """Send what is missing of an upload; the bytes sent."""
    missing = [part for part in location.parts if part.done < part.end - part.begin]
    for part in missing:
        put(part, body[part.begin : part.end])
    return sum(part.end - part.begin for part in missing)


def downloaded(location: Location) -> bytes:
    pieces = []
    for part in location.parts:
        status, data = ask("GET", part.url, headers={"Range": f"bytes={part.begin}-{part.end - 1}"})
        assert status == 206
        pieces.append(data)
    return b"".join(pieces)


def read(body: FileBody) -> bytes:
    return bytes(body.read(0, len(body)))


class Way:
    """A way to the endpoint that may break: bytes that came back over it, and when it breaks."""

    def __init__(self, endpoint: str, breaks_after_bytes: int) -> None:
        self.carried_bytes = 0
        self.breaks_after_bytes: float = breaks_after_bytes
        self.heals_at_once = True
        self._there = urlsplit(endpoint)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Way:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection((self._there.hostname or "", self._there.port or 0), timeout=20)
            for one, other, back in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._carry, args=(one, other, back), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket, back: bool) -> None:
        with suppress(OSError):
            while data := one.recv(2**14):
                if back and self.carried_bytes + len(data) > self.breaks_after_bytes:
                    if self.heals_at_once:
                        self.breaks_after_bytes = float("inf")
                    break
                self.carried_bytes += len(data) if back else 0
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Gateway(GatewayClient):
    """The gateway's answers of one node's calls, without the gateway."""

    def __init__(self, store: ObjectStore, node: str) -> None:
        super().__init__("http://127.0.0.1:1", None)
        self.store, self.node = store, node

    def json(self, method: str, path: str, body: object = None) -> Any:
        parts = path.strip("/").split("/")
        if parts[1] == "blobs":
            found = self.store.locate(parts[2])
            return found.model_dump() if found else None
        if parts[-1] == "finish":
            return self.store.finish_upload(self.node, parts[2])
        assert isinstance(body, dict)
        return self.store.begin_upload(self.node, parts[2], body["bytes"]).model_dump()


@contextmanager
def grown() -> Iterator[list[int]]:
    """How much more memory this process holds, sampled while the block runs."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page_bytes

    before, samples, ended = resident(), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.01):
            samples.append(resident() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
