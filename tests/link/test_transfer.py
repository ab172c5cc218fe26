"""Blobs arrive whole over connections that break; what cannot work ends with a sentence about what to do."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.fabric.gateways import Site, in_thread, sha256, some_bytes
from tests.faults.proxy import Proxy

from photon.errors import ConfigError
from photon.keys import client_context, create_authority, issue_node, revoke
from photon.link import transfer
from photon.link.body import FileBody, whole_file
from photon.link.partial import PartialFile, partial_names
from photon.link.store import Location, Part
from photon.link.transfer import GatewayClient, LinkDownError, LinkRefusedError, download, upload

MIB = 2**20
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    with in_thread(site):
        yield site


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("photon.link.partial.MIN_PART_BYTES", 4 * MIB)  # so that few MiB have several parts


def allow(site: Site, node: str, size: int) -> None:
    site.store.allow(node, size, time.time() + 600)


# Through the gateway


@pytest.mark.parametrize("streams", [1, 3])
def test_a_blob_goes_down_and_up_byte_for_byte(site: Site, tmp_path: Path, streams: int) -> None:
    data = some_bytes(11 * MIB + 5, seed=streams)
    site.store.publish(sha256(data), data)
    allow(site, "ada", len(data))
    seen: list[int] = []
    client, target = site.client(), tmp_path / "blob"
    moved = download(client, sha256(data), target, streams=streams, deadline_s=DEADLINE_S, on_bytes=seen.append)
    assert target.read_bytes() == data
    assert moved == sum(seen) == len(data)
    assert download(client, sha256(data), target, streams=streams, deadline_s=DEADLINE_S) == 0

    seen.clear()
    framed = tmp_path / "framed"
    framed.write_bytes(b"head" + data + b"tail")
    body = FileBody(framed, 4, len(data))
    sent = upload(client, sha256(data), body, streams=streams, deadline_s=DEADLINE_S, on_bytes=seen.append)
    assert sent == sum(seen) == len(data)
    fetched = site.store.fetch("ada", sha256(data), len(data))
    assert fetched.path.read_bytes() == data
    assert upload(client, sha256(data), body, streams=streams, deadline_s=DEADLINE_S) == 0  # it is there
    site.store.discard("ada")


def test_an_empty_blob_goes_down_and_up(site: Site, tmp_path: Path) -> None:
    site.store.publish(sha256(b""), b"")
    allow(site, "ada", 0)
    assert download(site.client(), sha256(b""), tmp_path / "blob", streams=2, deadline_s=DEADLINE_S) == 0
    assert (tmp_path / "blob").read_bytes() == b""
    assert upload(site.client(), sha256(b""), whole_file(tmp_path / "blob"), streams=2, deadline_s=DEADLINE_S) == 0
    assert len(site.store.fetch("ada", sha256(b""), 0)) == 0


def test_a_download_over_connections_that_break_goes_on_where_it_was(site: Site, tmp_path: Path) -> None:
    data = some_bytes(12 * MIB, seed=5)
    site.store.publish(sha256(data), data)
    breaks = [3 * MIB, 7 * MIB]
    with Proxy("127.0.0.1", site.port) as proxy:

        def on_bytes(count: int) -> None:
            done[0] += count
            if breaks and done[0] > breaks[0]:
                breaks.pop(0)
                proxy.cut()
                proxy.mend()

        done = [0]
        client = site.client(port=proxy.port)
        download(client, sha256(data), tmp_path / "blob", streams=2, deadline_s=DEADLINE_S, on_bytes=on_bytes)
        assert (tmp_path / "blob").read_bytes() == data
        assert not breaks
        assert proxy.accepted > 4
        # Two breaks of two streams cost what was under way; a download that starts anew costs 10 MiB more.
        assert done[0] <= len(data) + 4 * transfer.PIECE_BYTES


def test_a_download_that_was_given_up_goes_on_in_the_next_call(site: Site, tmp_path: Path) -> None:
    data = some_bytes(8 * MIB, seed=6)
    site.store.publish(sha256(data), data)

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) >= 5 * MIB:
            raise InterruptedError("the node is stopped")

    seen: list[int] = []
    with pytest.raises(InterruptedError):
        download(site.client(), sha256(data), tmp_path / "blob", streams=1, deadline_s=DEADLINE_S, on_bytes=stop)
    assert not (tmp_path / "blob").exists()
    rest = download(site.client(), sha256(data), tmp_path / "blob", streams=1, deadline_s=DEADLINE_S)
    assert rest == len(data) - sum(seen)
    assert (tmp_path / "blob").read_bytes() == data


def test_an_upload_over_a_connection_that_breaks_goes_on_where_it_was(site: Site, tmp_path: Path) -> None:
    data = some_bytes(12 * MIB, seed=7)
    (tmp_path / "blob").write_bytes(data)
    allow(site, "ada", len(data))
    with Proxy("127.0.0.1", site.port) as proxy:
        proxy.drop_after(6 * MIB)
        client = site.client(port=proxy.port)
        upload(client, sha256(data), whole_file(tmp_path / "blob"), streams=2, deadline_s=DEADLINE_S)
        assert site.store.fetch("ada", sha256(data), len(data)).path.read_bytes() == data
        # What the sockets on the way had taken in is sent again, and not the 6 MiB.
        assert proxy.bytes_up < len(data) + 4 * MIB


def test_a_transfer_that_does_not_end_is_given_up_at_the_deadline(site: Site, tmp_path: Path) -> None:
    data = some_bytes(2 * MIB, seed=8)
    site.store.publish(sha256(data), data)
    with Proxy("127.0.0.1", site.port) as proxy:
        proxy.cut()
        with pytest.raises(LinkDownError, match=r"not whole after 0\.3 s: no answer from 127\.0\.0\.1"):
            download(site.client(port=proxy.port), sha256(data), tmp_path / "x", streams=2, deadline_s=0.3)
        proxy.mend()
        proxy.throttle(200_000)
        with pytest.raises(LinkDownError, match="was stopped"):
            download(site.client(port=proxy.port), sha256(data), tmp_path / "x", streams=2, deadline_s=1.0)
        proxy.throttle(None)
        proxy.stall()
        with pytest.raises(LinkDownError, match="silent for too long"):
            site.client(port=proxy.port, timeout_s=0.2).json("GET", "/v1/run")


def test_what_is_refused_is_not_tried_again(site: Site, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"abc")
    body = whole_file(tmp_path / "blob")
    site.store.discard("bob")
    began = time.monotonic()
    with pytest.raises(LinkRefusedError, match="no such blob") as caught:
        download(site.client(), "0" * 64, tmp_path / "x", streams=1, deadline_s=600)
    assert caught.value.status == 404
    with pytest.raises(LinkRefusedError, match="no task asks") as caught:
        upload(site.client("bob"), sha256(b"abc"), body, streams=1, deadline_s=600)
    assert caught.value.status == 403
    allow(site, "bob", 2)
    with pytest.raises(LinkRefusedError, match="larger than") as caught:
        upload(site.client("bob"), sha256(b"abc"), body, streams=1, deadline_s=600)
    assert caught.value.status == 413
    assert time.monotonic() - began < 300  # far from the deadline: not a measure of speed
    assert not partial_names(tmp_path / "x")[0].exists()


def test_wrong_bytes_are_tried_once_more_and_then_named(site: Site, tmp_path: Path) -> None:
    data, lie = some_bytes(5 * MIB, seed=9), "1" * 64
    (tmp_path / "blob").write_bytes(data)
    site.store.publish(lie, data)
    allow(site, "ada", len(data))
    seen: list[int] = []
    with pytest.raises(LinkRefusedError, match="twice with other bytes"):
        download(site.client(), lie, tmp_path / "x", streams=2, deadline_s=DEADLINE_S, on_bytes=seen.append)
    assert sum(seen) == 2 * len(data)
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]
    seen.clear()
    with pytest.raises(LinkRefusedError, match="twice with other bytes"):
        upload(
            site.client(), lie, whole_file(tmp_path / "blob"), streams=2, deadline_s=DEADLINE_S, on_bytes=seen.append
        )
    assert sum(seen) == 2 * len(data)


def test_bytes_that_the_own_disk_had_lost_are_fetched_anew(site: Site, tmp_path: Path) -> None:
    data = some_bytes(1 * MIB, seed=10)
    site.store.publish(sha256(data), data)
    left = PartialFile(tmp_path / "blob", sha256(data), len(data))
    left.write(0, 0, bytes(1000))
    left.close()
    assert download(site.client(), sha256(data), tmp_path / "blob", streams=1, deadline_s=DEADLINE_S) > len(data)
    assert (tmp_path / "blob").read_bytes() == data


def test_two_processes_that_want_the_same_file_fetch_it_once(site: Site, tmp_path: Path) -> None:
    data = some_bytes(3 * MIB, seed=11)
    site.store.publish(sha256(data), data)
    other = PartialFile(tmp_path / "blob", sha256(data), len(data))
    moved: list[int] = []

    def wait_for_it() -> None:
        moved.append(download(site.client(), sha256(data), tmp_path / "blob", streams=1, deadline_s=DEADLINE_S))

    waiting = threading.Thread(target=wait_for_it)
    waiting.start()
    for begin in range(0, len(data), MIB):
        other.write(0, begin, data[begin : begin + MIB])
    other.finish()
    waiting.join(DEADLINE_S)
    assert moved == [0]


def test_an_own_disk_that_is_full_is_not_taken_for_a_bad_link(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_bytes(MIB, seed=12)
    site.store.publish(sha256(data), data)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PartialFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        download(site.client(), sha256(data), tmp_path / "x", streams=2, deadline_s=600)


# Small calls


def test_connections_are_used_again_and_a_closed_one_is_not(site: Site) -> None:
    with Proxy("127.0.0.1", site.port) as proxy:
        client = site.client(port=proxy.port)
        for _ in range(5):
            assert client.json("GET", "/v1/run")["run"] == "r"
        assert proxy.accepted == 1
        proxy.cut()
        proxy.mend()
        deadline = time.monotonic() + DEADLINE_S
        while proxy.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # until the end has reached the client's socket
        assert client.call("POST", "/v1/fleet/pull-messages", b"xy") == b"ada|pull-messages|xy"
        assert proxy.accepted == 2
        client.close()


@pytest.mark.parametrize(
    "url",
    ["example.org:1", "ftp://h:1", "https://h:99999999", "http://example.org:80", "https://h:1/path", "https://u@h"],
)
def test_what_is_no_address_of_a_gateway_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a gateway"):
        GatewayClient(url, ssl.create_default_context())


def test_https_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="key file"):
        GatewayClient("https://localhost:1", None)


# TLS: which end to mend


def refusal(client: GatewayClient) -> str:
    with pytest.raises(LinkRefusedError) as caught:
        client.json("GET", "/v1/run")
    return str(caught.value)


def test_a_node_without_a_certificate_is_told_so(site: Site) -> None:
    context = ssl.create_default_context(cafile=str(site.keys / "ca.crt"))
    assert "asks for a certificate" in refusal(GatewayClient(f"https://127.0.0.1:{site.port}", context, 5.0))


def test_a_certificate_of_another_federation_is_told_apart(site: Site, tmp_path: Path) -> None:
    create_authority(tmp_path / "keys")
    issue_node(tmp_path / "keys", "ada")
    url = f"https://127.0.0.1:{site.port}"
    context = client_context(tmp_path / "keys" / "ada.key")
    assert "not from the authority that made this node's key" in refusal(GatewayClient(url, context, 5.0))
    context.load_verify_locations(site.keys / "ca.crt")  # now only the gateway has something against it
    assert "does not know the authority" in refusal(GatewayClient(url, context, 5.0))


def test_another_host_name_is_told(site: Site) -> None:
    context = client_context(site.keys / "ada.key")
    assert "--host 127.0.0.2" in refusal(GatewayClient(f"https://127.0.0.2:{_forwarded(site)}", context, 5.0))


def _forwarded(site: Site) -> int:
    """A port of 127.0.0.2 behind which the gateway is."""
    listener = socket.create_server(("127.0.0.2", 0))

    def carry() -> None:
        with listener, listener.accept()[0] as client, socket.create_connection(("127.0.0.1", site.port)) as server:
            threads = [threading.Thread(target=_copy, args=pair) for pair in ((client, server), (server, client))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(DEADLINE_S)

    threading.Thread(target=carry, daemon=True).start()
    return int(listener.getsockname()[1])


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_a_revoked_certificate_is_told(site: Site) -> None:
    issue_node(site.keys, "bob2")
    client = site.client("bob2")
    assert "takes no part in this run" in refusal(client)
    revoke(site.keys, "bob2")
    assert "was revoked" in refusal(client)


def test_a_port_that_speaks_no_tls_is_told(site: Site) -> None:
    with plain_server({}) as server:
        context = client_context(site.keys / "ada.key")
        assert "does not speak TLS" in refusal(GatewayClient(f"https://127.0.0.1:{server}", context, 5.0))


def test_nobody_there_is_worth_another_try(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LinkDownError, match="refused"):
        site.client(port=port).json("GET", "/v1/run")


# Presigned URLs: a bucket stands behind them


@contextmanager
def plain_server(blobs: dict[str, bytes], ticks: list[str] | None = None) -> Iterator[int]:
    """A bucket and a small gateway in one: plain HTTP, what is PUT to /bucket/N stays in `blobs`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def note(self) -> None:
            if ticks is not None:
                ticks.append(
                    f"{self.command} {self.path} {self.headers.get('Range') or self.headers.get('Content-Range')}"
                )

        def do_GET(self) -> None:  # the library's name
            self.note()
            path = self.path.split("?")[0]
            if self.path.startswith("/v1/blobs/"):
                self.answer(200, blobs["location"])
            elif "expired" in self.path:
                self.answer(403, b"<Error><StringToSign>SIGNATURE</StringToSign></Error>")
            elif path in blobs and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                low, high = int(match[1]), int(match[2]) + 1
                data = blobs[path]
                self.answer(206, data[low:high], Content_Range=f"bytes {low}-{high - 1}/{len(data)}")
            else:
                self.answer(404)

        def do_PUT(self) -> None:  # the library's name
            self.note()
            blobs[self.path.split("?")[0]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200)

        def do_POST(self) -> None:  # the library's name
            self.note()
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, b"{}" if self.path.endswith("finish") else blobs["location"])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(DEADLINE_S)


def located(url: str, size: int, edges: list[int], done: tuple[int, ...] = ()) -> bytes:
    counts = [*done, *[0] * (len(edges) - len(done))]
    parts = [
        Part(url=url.format(index), begin=low, end=high, done=count)
        for index, (low, high, count) in enumerate(zip(edges, [*edges[1:], size], counts, strict=True))
    ]
    return Location(bytes=size, parts=parts).model_dump_json().encode()


def test_presigned_urls_are_read_with_ranges_and_written_whole(tmp_path: Path) -> None:
    data = some_bytes(3 * MIB, seed=13)
    edges = [0, MIB, MIB + 7]
    blobs: dict[str, bytes] = {"/bucket/base": data}
    ticks: list[str] = []
    with plain_server(blobs, ticks) as port:
        client = GatewayClient(f"http://127.0.0.1:{port}", None)
        blobs["location"] = located(f"http://127.0.0.1:{port}/bucket/base?sig=1", len(data), edges)
        download(client, sha256(data), tmp_path / "blob", streams=2, deadline_s=DEADLINE_S)
        assert (tmp_path / "blob").read_bytes() == data
        ticks.clear()
        url = f"http://127.0.0.1:{port}/bucket/up/{{}}?sig=1"
        blobs["location"] = located(url, len(data), edges, (MIB,))  # the first part is there from before
        upload(client, sha256(data), whole_file(tmp_path / "blob"), streams=2, deadline_s=DEADLINE_S)
    assert "/bucket/up/0" not in blobs
    assert blobs["/bucket/up/1"] + blobs["/bucket/up/2"] == data[MIB:]
    puts = [tick for tick in ticks if tick.startswith("PUT")]
    assert len(puts) == 2
    assert all(tick.endswith("?sig=1 None") for tick in puts)


def test_a_url_that_is_too_old_is_asked_for_anew_and_no_signature_is_repeated(tmp_path: Path) -> None:
    data = some_bytes(1000, seed=14)
    blobs = {"/bucket/base": data}
    ticks: list[str] = []
    with plain_server(blobs, ticks) as port:
        client = GatewayClient(f"http://127.0.0.1:{port}", None)
        url = f"http://127.0.0.1:{port}/bucket/base?sig="
        blobs["location"] = located(url + "expired", 1000, [0])
        with pytest.raises(LinkDownError, match="status 403") as caught:
            download(client, sha256(data), tmp_path / "blob", streams=1, deadline_s=0.3)
        assert "SIGNATURE" not in str(caught.value)
        assert "sig" not in str(caught.value)
        thread = threading.Timer(0.2, lambda: blobs.update(location=located(url + "fresh", 1000, [0])))
        thread.start()
        download(client, sha256(data), tmp_path / "blob", streams=1, deadline_s=DEADLINE_S)
        thread.join()
    assert (tmp_path / "blob").read_bytes() == data


@pytest.mark.parametrize(
    "url", ["http://example.org/x", "file:///etc/passwd", "//example.org/x", "ftp://h/x", "https://u:p@h/x", "x"]
)
def test_a_part_elsewhere_is_only_asked_for_over_tls(tmp_path: Path, url: str) -> None:
    blobs = {"location": located(url, 5, [0])}
    with plain_server(blobs) as port, pytest.raises(LinkRefusedError):
        download(GatewayClient(f"http://127.0.0.1:{port}", None), "0" * 64, tmp_path / "x", streams=1, deadline_s=600)


@pytest.mark.parametrize("answer", [b"[]", b'{"bytes": 5, "parts": []}', b'{"bytes": -1, "parts": []}', b"{}"])
def test_a_location_that_makes_no_sense_is_refused(tmp_path: Path, answer: bytes) -> None:
    with plain_server({"location": answer}) as port, pytest.raises(LinkRefusedError, match="makes no sense"):
        download(GatewayClient(f"http://127.0.0.1:{port}", None), "0" * 64, tmp_path / "x", streams=1, deadline_s=600)
