"""Bytes of blobs on connections of their own: many requests on one, nothing malformed, and few threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fabric.gateways import (
    DEADLINE_S,
    Answer,
    Site,
    allow,
    ask,
    ask_over,
    begin,
    connect,
    finish,
    in_thread,
    put,
    raw,
    sha256,
    some_bytes,
)

from photon.fabric import admission, blobs, gateway
from photon.fabric.admission import RequestRefusedError
from photon.keys import revoke

MIB = 2**20
DATA = some_bytes(3 * MIB, seed=1)
SHA = sha256(DATA)
GET = f"GET /v1/blobs/{SHA}/data HTTP/1.1\r\n".encode()
PUT = f"PUT /v1/uploads/{SHA}/0 HTTP/1.1\r\n".encode()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    with in_thread(site):
        site.store.publish(SHA, DATA)
        yield site


@pytest.fixture
def own_site(tmp_path: Path) -> Site:
    """A site whose gateway the test starts itself."""
    return Site(tmp_path)


def span(begin: int, end: int) -> dict[str, str]:
    return {"Content_Range": f"bytes {begin}-{end - 1}/{len(DATA)}"}


def test_one_connection_carries_many_requests(site: Site) -> None:
    allow(site, "ada", len(DATA))
    begin(site, SHA, len(DATA))
    with closing(connect(site)) as connection:
        for low in range(0, len(DATA), MIB):
            path = f"/v1/blobs/{SHA}/data"
            part = ask_over(connection, "GET", path, Range=f"bytes={low}-{low + MIB - 1}")
            assert (part.status, part.body) == (206, DATA[low : low + MIB])
            sent = ask_over(connection, "PUT", f"/v1/uploads/{SHA}/0", part.body, **span(low, low + MIB))
            assert (sent.status, sent.json) == (200, {"done": low + MIB})
    assert finish(site, SHA).status == 200
    assert site.store.fetch("ada", SHA, len(DATA)).path.read_bytes() == DATA
    site.store.discard("ada")


def test_other_requests_need_another_connection_and_the_reverse_which_a_client_finds_out(site: Site) -> None:
    with closing(connect(site)) as connection:
        assert ask_over(connection, "GET", "/v1/run").status == 200
        assert ask_over(connection, "GET", f"/v1/blobs/{SHA}/data").status == 421
    with closing(connect(site)) as connection:
        assert ask_over(connection, "GET", f"/v1/blobs/{SHA}/data").status == 200
        assert ask_over(connection, "GET", "/v1/run").status == 421
    client = site.client()
    for _ in range(2):
        assert client.json("GET", "/v1/run")["run"] == "r"
        assert client.call("GET", f"/v1/blobs/{SHA}/data") == DATA
    client.close()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (GET + b"Range: bytes=0-1\r\nRange: bytes=0-1\r\n\r\n", 400),
        (GET + b"no colon\r\n\r\n", 400),
        (GET + b" folded: x\r\n\r\n", 400),
        (GET + b"X: a\r\n b\r\n\r\n", 400),
        (GET + b"X : a\r\n\r\n", 400),
        (GET + b"X: \x00\r\n\r\n", 400),
        (GET + b"X: \xc3\xa9\r\n\r\n", 400),
        (GET + b"X: a\nY: b\r\n\r\n", 400),
        (GET + b"Content-Length: 5\r\n\r\nabcde", 400),
        (GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (GET + b"X: " + b"a" * 10_000 + b"\r\n\r\n", 431),
        (GET + b"".join(b"X-%d: a\r\n" % number for number in range(5000)), 431),
        (PUT + b"Content-Range: bytes 0-4/3145728\r\n\r\n", 411),
        (PUT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-4/3145728\r\n\r\n", 411),
        (PUT + b"Content-Length: +5\r\nContent-Range: bytes 0-4/3145728\r\n\r\nabcde", 400),
        (PUT + b"Content-Length: 5, 5\r\nContent-Range: bytes 0-4/3145728\r\n\r\nabcde", 400),
        (PUT + b"Content-Length: 5\r\nContent-Length: 5\r\nContent-Range: bytes 0-4/3145728\r\n\r\nabcde", 400),
        (PUT + b"Content-Length: " + b"9" * 30 + b"\r\nContent-Range: bytes 0-4/3145728\r\n\r\nabcde", 400),
    ],
)  # fmt: skip
def test_what_is_not_well_formed_is_refused_and_nothing_behind_it_is_read(site: Site, head: bytes, status: int) -> None:
    allow(site, "ada", len(DATA))
    begin(site, SHA, len(DATA))
    received = raw(site, head + b"GET /v1/run HTTP/1.1\r\nHost: x\r\n\r\n")
    assert received.split(b" ")[1] == str(status).encode()
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close\r\n" in received
    assert b'{"error": ' in received
    site.store.discard("ada")


@given(st.binary(max_size=60))
def test_a_head_is_understood_or_refused(tail: bytes) -> None:
    try:
        head = blobs.parse_head(GET.rstrip() + b"\r\n" + tail)
    except RequestRefusedError as error:
        assert error.status == 400
    else:
        assert all(name == name.lower() and "\n" not in value for name, value in head.headers.items())


def test_a_careful_client_is_told_to_go_on(site: Site) -> None:
    allow(site, "ada", len(DATA))
    begin(site, SHA, len(DATA))
    head = f"Content-Length: 5\r\nContent-Range: bytes 0-4/{len(DATA)}\r\nExpect: 100-continue\r\n"
    received = raw(site, PUT + head.encode() + b"Connection: close\r\n\r\n" + DATA[:5])
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    site.store.discard("ada")


def test_a_revocation_holds_for_the_next_blob_of_an_open_connection(own_site: Site) -> None:
    own_site.store.publish(SHA, DATA)
    with in_thread(own_site), closing(connect(own_site)) as connection:
        assert ask_over(connection, "GET", f"/v1/blobs/{SHA}/data").status == 200
        revoke(own_site.keys, "ada")
        answer = ask_over(connection, "GET", f"/v1/blobs/{SHA}/data")
        assert answer.status == 403
        assert "was revoked" in answer.json["error"]


def held_open(site: Site, stack: ExitStack, name: str) -> Answer:
    """The answer to a request whose connection stays open."""
    connection = stack.enter_context(closing(connect(site, name)))
    return ask_over(connection, "GET", f"/v1/blobs/{SHA}/data", Range="bytes=0-0")


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done()


@pytest.mark.parametrize(("limit", "status"), [("one identity", 429), ("everybody", 503)])
def test_connections_are_few(own_site: Site, monkeypatch: pytest.MonkeyPatch, limit: str, status: int) -> None:
    if limit == "one identity":
        monkeypatch.setattr(admission, "MAX_REQUESTS_AT_ONCE", 2)
    else:
        monkeypatch.setattr(blobs, "MAX_LINES", 2)
    own_site.store.publish(SHA, DATA)
    with in_thread(own_site):
        with ExitStack() as stack:
            assert [held_open(own_site, stack, "ada").status for _ in range(3)] == [206, 206, status]
            assert held_open(own_site, stack, "bob").status == 206  # others are not touched
        until(lambda: ask(own_site, "GET", f"/v1/blobs/{SHA}/data").status == 200)


def test_who_moves_bytes_over_all_its_connections_can_still_say_that_it_is_there(
    own_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a node that uses as many streams as it may would be offline while it downloads."""
    monkeypatch.setattr(admission, "MAX_REQUESTS_AT_ONCE", 2)
    own_site.store.publish(SHA, DATA)
    with in_thread(own_site), ExitStack() as stack:
        assert [held_open(own_site, stack, "ada").status for _ in range(3)] == [206, 206, 429]
        assert ask(own_site, "POST", "/v1/fleet/send-node-heartbeat").status == 200


def threads() -> int:
    return sum(thread.name == "photon-blobs" for thread in threading.enumerate())


def test_silence_and_drips_end_a_connection_and_its_thread(own_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SILENCE_S", 0.3)
    monkeypatch.setattr(gateway, "_LINGER_S", 0.1)
    own_site.store.publish(SHA, DATA)
    with in_thread(own_site):
        assert raw(own_site, GET + b"X: half a head") == b""
        with closing(connect(own_site)) as connection:
            assert ask_over(connection, "GET", f"/v1/blobs/{SHA}/data", Range="bytes=0-0").status == 206
            until(lambda: threads() == 0)  # a silent one is not kept either
        with closing(connect(own_site)) as connection:
            connection.connect()
            connection.sock.sendall(GET)
            with pytest.raises(OSError):
                for _ in range(100):  # a byte now and then does not make a head come sooner
                    connection.sock.sendall(b"X")
                    time.sleep(0.1)
        until(lambda: threads() == 0)


def test_a_gateway_that_stops_does_not_wait_for_who_reads_slowly(own_site: Site) -> None:
    data = some_bytes(24 * MIB, seed=2)
    own_site.store.publish(sha256(data), data)
    with closing(connect(own_site)) as connection:
        with in_thread(own_site):
            connection.port = own_site.port
            connection.request("GET", f"/v1/blobs/{sha256(data)}/data")
            assert connection.getresponse().status == 200
            began = time.monotonic()
        assert time.monotonic() - began < gateway.SILENCE_S / 2
    assert threads() == 0


def test_the_disk_is_not_touched_by_a_body_that_nobody_asked_for(site: Site) -> None:
    began = len(list((site.store.root / "up").rglob("*")))
    assert put(site, DATA, 0, len(DATA), SHA).status == 403
    assert put(site, DATA, 0, len(DATA), "0" * 64).status == 403
    assert len(list((site.store.root / "up").rglob("*"))) == began
