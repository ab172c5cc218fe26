"""Every byte that crossed is on its node's account."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import closing
from pathlib import Path

import pytest
from tests.fabric.gateways import (
    DEADLINE_S,
    Site,
    allow,
    ask,
    begin,
    connect,
    finish,
    in_thread,
    put,
    sha256,
    some_bytes,
)
from tests.faults.proxy import Proxy

from photon.fabric import traffic
from photon.fabric.traffic import TcpBytes, TrafficAccounts, read_traffic, tcp_bytes
from photon.link.body import whole_file
from photon.link.transfer import download, upload

MIB = 2**20
DATA = some_bytes(100_000, seed=1)
SHA = "0" * 64


@pytest.fixture
def own_site(tmp_path: Path) -> Site:
    """A site whose gateway the test starts itself."""
    return Site(tmp_path)


def blobs(site: Site, node: str) -> tuple[int, int]:
    account = site.traffic().get(node, {})
    return account.get("blob_up", 0), account.get("blob_down", 0)


def test_every_byte_of_a_body_is_accounted_for_also_what_was_sent_twice_or_refused(own_site: Site) -> None:
    data = DATA
    with in_thread(own_site):
        own_site.store.publish(sha256(data), data)
        allow(own_site, "ada", len(data))
        ask(own_site, "GET", f"/v1/blobs/{sha256(data)}/data")
        ask(own_site, "GET", f"/v1/blobs/{sha256(data)}/data", Range="bytes=0-999")
        ask(own_site, "GET", f"/v1/blobs/{sha256(data)}/data", Range="bytes=0-99", name="bob")
        for _ in range(2):
            begin(own_site, SHA, len(data))
            put(own_site, data, 0, len(data), SHA)
            assert finish(own_site, SHA).status == 422
    assert (blobs(own_site, "ada"), blobs(own_site, "bob")) == ((200_000, 101_000), (0, 100))
    with in_thread(own_site):  # a gateway that starts again goes on with the accounts, and writes them while it runs
        ask(own_site, "GET", f"/v1/blobs/{sha256(data)}/data", Range="bytes=0-0")
        deadline = time.monotonic() + DEADLINE_S
        while blobs(own_site, "ada")[1] == 101_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert blobs(own_site, "ada") == (200_000, 101_001)


def exchange(site: Site, port: int, folder: Path, data: bytes) -> None:
    """A base down, an update up, and calls between."""
    client = site.client(port=port)
    for _ in range(5):
        client.json("GET", "/v1/status")
        client.call("POST", "/v1/fleet/push-messages", bytes(50_000))
    download(client, sha256(data), folder / "base", streams=3, deadline_s=DEADLINE_S)
    upload(client, sha256(data), whole_file(folder / "base"), streams=3, deadline_s=DEADLINE_S)
    client.close()


@pytest.mark.parametrize("by_kernel", [True, False])
def test_what_a_node_sent_is_what_a_proxy_between_saw(
    own_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_kernel: bool
) -> None:
    monkeypatch.setattr("photon.link.partial.MIN_PART_BYTES", 2 * MIB)  # so that few MiB have several parts
    if not by_kernel:
        monkeypatch.setattr(traffic, "tcp_bytes", lambda sock: None)
    data = some_bytes(7 * MIB, seed=2)
    with in_thread(own_site), Proxy("127.0.0.1", own_site.port) as proxy:
        own_site.store.publish(sha256(data), data)
        allow(own_site, "ada", len(data))
        exchange(own_site, proxy.port, tmp_path, data)
    account = own_site.traffic()["ada"]
    assert account["counted"] == ("kernel" if by_kernel else "application")
    assert (account["blob_up"], account["blob_down"]) == (len(data), len(data))
    assert account["sent_up"] == pytest.approx(proxy.bytes_up, rel=0.01)
    assert account["sent_down"] == pytest.approx(proxy.bytes_down, rel=0.01)
    assert account["sent_up"] > len(data) + 250_000
    assert own_site.traffic()["bob"]["sent_up"] == 0


def test_bytes_of_a_body_that_never_left_do_not_count(own_site: Site) -> None:
    data = some_bytes(40 * MIB, seed=3)
    own_site.store.publish(sha256(data), data)
    with in_thread(own_site), closing(connect(own_site)) as connection:
        connection.request("GET", f"/v1/blobs/{sha256(data)}/data")
        received = len(connection.getresponse().read(MIB))
        deadline = time.monotonic() + DEADLINE_S
        while own_site.traffic().get("ada", {}).get("sent_down", 0) < received and time.monotonic() < deadline:
            time.sleep(0.05)  # accounts are saved while a blob is on its way
        reset = struct.pack("ii", 1, 0)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    account = own_site.traffic()["ada"]
    assert received <= account["blob_down"] <= account["sent_down"] < len(data)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(104, None), (136, TcpBytes(7, 5)), (216, TcpBytes(7, 8, 3)), (256, TcpBytes(7, 8, 3))],
)
def test_an_older_kernel_says_less(length: int, expected: TcpBytes | None) -> None:
    class Old:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            info = bytearray(256)
            struct.pack_into("=QQ", info, 120, 5, 7)
            struct.pack_into("=QQ", info, 200, 11, 3)
            return bytes(info[:length])

    assert tcp_bytes(Old()) == expected  # type: ignore[arg-type]  # all that is asked of a socket


def test_accounts_with_the_names_of_before_are_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "traffic.json").write_text('{"ada": {"bytes_up": 3, "bytes_down": 4}}')
    accounts = TrafficAccounts(tmp_path / "traffic.json", ["ada"])
    accounts.up("ada", 10)
    accounts.save()
    account = read_traffic(tmp_path / "traffic.json")["ada"]
    assert (account.blob_up, account.blob_down, account.bytes_up, account.bytes_down) == (13, 4, 13, 4)


def test_a_stranger_to_the_run_has_no_account(own_site: Site) -> None:
    with in_thread(own_site):
        assert ask(own_site, "GET", "/v1/run", name="carol").status == 403
        assert ask(own_site, "GET", f"/v1/blobs/{SHA}/data", name="carol").status == 403
        ask(own_site, "GET", "/v1/run")
    assert set(own_site.traffic()) == {"ada", "bob"}
