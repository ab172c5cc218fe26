"""Blobs arrive whole over connections that break; what cannot work ends with a sentence about what to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fabric.gateways import Site, in_thread, sha256, some_bytes
from tests.faults.proxy import Proxy
from tests.link.plain import plain_server

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


@pytest.mark.parametrize("going", ["up", "down"])
def test_a_part_that_is_whole_is_not_asked_for_again_because_the_last_answer_was_lost(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, going: str
) -> None:
    """Nothing is missing of it, and a request for no bytes is one that the other end refuses."""
    data, kind = some_bytes(3 * MIB, seed=11), transfer._Upload if going == "up" else transfer._Download
    move, lost = kind.move, list[int]()

    def breaks_at_the_end(self: transfer._Upload, lines: transfer._Lines, location: Location, index: int) -> None:
        move(self, lines, location, index)
        if not lost:
            lost.append(index)
            raise LinkDownError("the connection was reset")

    monkeypatch.setattr(kind, "move", breaks_at_the_end)
    if going == "up":
        (tmp_path / "blob").write_bytes(data)
        allow(site, "ada", len(data))
        sent = upload(site.client(), sha256(data), whole_file(tmp_path / "blob"), streams=1, deadline_s=DEADLINE_S)
        assert site.store.fetch("ada", sha256(data), len(data)).path.read_bytes() == data
    else:
        site.store.publish(sha256(data), data)
        sent = download(site.client(), sha256(data), tmp_path / "blob", streams=1, deadline_s=DEADLINE_S)
        assert (tmp_path / "blob").read_bytes() == data
    assert (len(lost), sent) == (1, len(data))


def test_a_transfer_that_does_not_end_is_given_up_at_the_deadline(site: Site, tmp_path: Path) -> None:
    data = some_bytes(2 * MIB, seed=8)
    site.store.publish(sha256(data), data)
    with Proxy("127.0.0.1", site.port) as proxy:
        proxy.cut()
        with pytest.raises(LinkDownError, match=r"not whole after 0\.3 s: no answer from 127\.0\.0\.1"):
            download(site.client(port=proxy.port), sha256(data), tmp_path / "x", streams=2, deadline_s=0.3)
        proxy.mend()
        proxy.throttle(1_000_000)
        with pytest.raises(LinkDownError, match="was stopped"):
            download(site.client(port=proxy.port), sha256(data), tmp_path / "x", streams=2, deadline_s=0.5)
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


# Presigned URLs: a bucket stands behind them


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
