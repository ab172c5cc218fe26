"""An authority to test with, connections over real TLS on 127.0.0.1, and Photon's clock set to another day.

A test module takes the fixtures by name: `ready, folder = authorities.ready, authorities.folder`.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from photon import certificates
from photon.keys import create_authority, issue_node

DEADLINE_S = 10.0
Peer = dict[str, Any]


def authority_with(folder: Path, node: str) -> Path:
    """A new authority in `folder`, which has issued the key of one node."""
    create_authority(folder)
    issue_node(folder, node)
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a node `alice`, not to be changed."""
    return authority_with(tmp_path_factory.mktemp("keys") / "keys", "alice")


@pytest.fixture
def folder(ready: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(ready, tmp_path / "keys"))


def at(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Let Photon's clock be `days` from the real one; OpenSSL's stays."""
    monkeypatch.setattr(certificates, "now", lambda: datetime.now(UTC).replace(microsecond=0) + timedelta(days=days))


def converse(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> Peer:
    """One connection over a real socket, a byte each way: what the server sees of the client.

    Raises what the client met. In TLS 1.3 it learns only with its first read that the server did not want it.
    """
    seen: list[Peer] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(DEADLINE_S)
        try:
            with server.wrap_socket(connection, server_side=True) as secured:
                seen.append(secured.getpeercert() or {})
                secured.sendall(secured.recv(1))
        except OSError:  # the client's side of the story is the one that is told
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=DEADLINE_S) as plain,
                client.wrap_socket(plain, server_hostname=host) as secured,
            ):
                secured.sendall(b"?")
                if secured.recv(1) != b"?":
                    raise ConnectionError("the server closed the connection")
                assert secured.version() == "TLSv1.3"
        finally:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
    return seen[0]


def refused(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> bool:
    try:
        converse(server, client, host)
    except OSError:  # SSLError is one
        return True
    return False


def loose_client(folder: Path, bundle: Path | None) -> ssl.SSLContext:
    """A client that shows `bundle` unchecked, or nothing, and trusts the authority in `folder`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca.crt")
    if bundle is not None:
        context.load_cert_chain(bundle)
    return context
