"""Who may ask the gateway what; everybody else is told no, and costs nothing."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPSConnection
from pathlib import Path

import pytest
from tests.fabric.gateways import (
    DEADLINE_S,
    STATUS,
    Site,
    allow,
    ask,
    ask_over,
    begin,
    connect,
    in_thread,
    raw,
    sha256,
    some_bytes,
)

from photon.fabric import admission, gateway
from photon.keys import issue_node, revoke

MIB = 2**20
DATA = some_bytes(3 * MIB, seed=1)
SHA = sha256(DATA)


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


def test_without_a_certificate_of_ours_no_byte_is_answered(site: Site) -> None:
    context = ssl.create_default_context(cafile=str(site.keys / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", site.port), timeout=DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"),
    ):
        connection.sendall(b"GET /v1/run HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(1)
    with socket.create_connection(("127.0.0.1", site.port), timeout=DEADLINE_S) as plain:
        plain.sendall(b"GET /v1/run HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in plain.recv(1000)


def test_the_aggregators_own_certificate_is_no_identity(site: Site) -> None:
    context = ssl.create_default_context(cafile=str(site.keys / "ca.crt"))
    context.load_cert_chain(site.keys / "aggregator.pem")
    with (
        closing(HTTPSConnection("127.0.0.1", site.port, timeout=DEADLINE_S, context=context)) as connection,
        pytest.raises(ssl.SSLError, match=r"(?i)unsupported.certificate"),
    ):
        ask_over(connection, "GET", "/v1/run")


def test_a_stranger_to_the_run_is_refused_everywhere(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/v1/run", "/v1/status", f"/v1/blobs/{SHA}", f"/v1/blobs/{SHA}/data", "/nothing"):
        answer = ask(site, "GET", path, name="carol")
        assert (answer.status, answer.json) == (403, {"error": "carol takes no part in this run"})
    assert ask(site, "POST", "/v1/fleet/pull-messages", name="carol").status == 403
    assert "refused carol at 127.0.0.1: 403 carol takes no part" in caplog.text


def test_a_revocation_holds_for_the_next_request_of_an_open_connection(own_site: Site) -> None:
    with in_thread(own_site), closing(connect(own_site)) as connection:
        assert ask_over(connection, "GET", "/v1/run").status == 200
        revoke(own_site.keys, "ada")
        answer = ask_over(connection, "GET", "/v1/run")
        assert answer.status == 403
        assert "was revoked" in answer.json["error"]
        issue_node(own_site.keys, "ada")  # takes the place of the revoked one
        assert ask(own_site, "GET", "/v1/run").status == 200
        (own_site.keys / "revoked.txt").write_text("?")
        answer = ask(own_site, "GET", "/v1/run")
        assert answer.status == 503  # nobody is admitted while it cannot be read
        assert str(own_site.root) not in answer.json["error"]


def test_an_operator_sees_the_run_and_nothing_else(site: Site) -> None:
    assert ask(site, "GET", "/v1/status", name="operator").json == STATUS
    assert ask(site, "GET", "/v1/run", name="operator").status == 200
    for method, path in (
        ("GET", f"/v1/blobs/{SHA}"),
        ("POST", f"/v1/uploads/{SHA}"),
        ("POST", "/v1/fleet/push-messages"),
    ):
        assert ask(site, method, path, name="operator").status == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/run/", 404),
        ("GET", "/v1/blobs", 404),
        ("GET", f"/v1/uploads/{SHA}/0", 405),
        ("DELETE", f"/v1/blobs/{SHA}", 405),
        ("HEAD", f"/v1/blobs/{SHA}/data", 405),
        ("POST", "/v1/run", 405),
        ("PUT", f"/v1/blobs/{SHA}/data", 405),
        ("PATCH", "/v1/run", 405),
        ("POST", "/v1/fleet/Pull_Messages", 404),
        ("POST", "/v1/fleet/a/b", 404),
    ],
)
def test_every_other_place_and_method_is_refused_in_json(site: Site, method: str, path: str, status: int) -> None:
    answer = ask(site, method, path)
    assert answer.status == status
    assert answer.headers["Content-Type"].startswith("application/json")
    assert method == "HEAD" or "error" in answer.json


def test_a_huge_header_is_refused(site: Site) -> None:
    for head in (b"X-A: " + b"a" * 10**6, b"\r\n".join(b"X-%d: a" % number for number in range(10**4))):
        received = raw(site, b"GET /v1/run HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert received == b"" or received.split(b" ")[1] == b"400"
    assert raw(site, b"GET /" + b"a" * 10**6 + b" HTTP/1.1\r\n\r\n").split(b" ")[1:2] in ([], [b"400"])
    assert ask(site, "GET", "/v1/run").status == 200


def test_who_sends_slowly_is_shut_out(own_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SILENCE_S", 0.3)
    monkeypatch.setattr(gateway, "HANDSHAKE_S", 0.3)
    monkeypatch.setattr(gateway, "_LINGER_S", 0.1)
    with in_thread(own_site):
        allow(own_site, "ada", 1000)
        begin(own_site, SHA, 1000)
        half_a_header = b"GET /v1/run HTTP/1.1\r\nHost"
        assert raw(own_site, b"") == raw(own_site, half_a_header) == b""
        head = b"PUT /v1/uploads/%s/0 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n" % SHA.encode()
        received = raw(own_site, head + b"Content-Range: bytes 0-999/1000\r\n\r\nabc")
        assert received.split(b" ")[1] == b"408"
        received = raw(own_site, b"POST /v1/fleet/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        assert received.split(b" ")[1] == b"408"
        with socket.create_connection(("127.0.0.1", own_site.port), timeout=DEADLINE_S) as silent:
            assert silent.recv(1) == b""  # no handshake


def test_who_reads_slowly_is_shut_out(own_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SILENCE_S", 0.3)
    with in_thread(own_site), closing(connect(own_site)) as connection:
        data = some_bytes(24 * MIB)
        own_site.store.publish(sha256(data), data)
        connection.request("GET", f"/v1/blobs/{sha256(data)}/data")
        response = connection.getresponse()
        time.sleep(1.0)
        received = 0
        with suppress(OSError):
            while piece := response.read(MIB):
                received += len(piece)
        assert received < len(data)
    assert own_site.traffic()["ada"]["blob_down"] < len(data)


def test_who_does_not_read_its_answers_is_shut_out(own_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SILENCE_S", 0.3)
    call = b"POST /v1/fleet/x HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + bytes(200_000)
    with in_thread(own_site), closing(connect(own_site)) as connection:
        connection.connect()
        with pytest.raises(OSError):  # nor does the gateway take ever more calls
            for _ in range(500):
                connection.sock.sendall(call)
        assert ask(own_site, "GET", "/v1/run").status == 200


def test_one_identity_has_few_requests_open_at_once(own_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_REQUESTS_AT_ONCE", 2)
    with in_thread(own_site), closing(connect(own_site)) as first, closing(connect(own_site)) as second:
        for connection in (first, second):
            connection.putrequest("POST", "/v1/fleet/x")
            connection.putheader("Content-Length", "5")
            connection.endheaders(b"1")
        deadline = time.monotonic() + DEADLINE_S
        while (answer := ask(own_site, "GET", "/v1/run")).status == 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert answer.status == 429
        assert ask(own_site, "GET", "/v1/run", name="bob").status == 200  # others are not touched
        for connection in (first, second):
            connection.send(b"2345")
            assert connection.getresponse().status == 200
        assert ask(own_site, "GET", "/v1/run").status == 200


def test_the_log_tells_of_so_many_refusals_a_minute_and_of_the_number_of_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    remarks, most = admission.Remarks(), admission.MAX_REMARKS_A_MINUTE
    told = [remarks.may_tell("ada", 100.0 + number * 0.01) for number in range(1000)]
    assert told == [True] * most + [False] * (1000 - most)
    assert remarks.may_tell("bob", 101.0)  # whatever ada does
    assert not remarks.may_tell("ada", 159.9)
    assert remarks.may_tell("ada", 160.0)
    assert f"refused ada {1001 - most} times more" in caplog.text
    assert remarks.may_tell("ada", 1e6)
    assert caplog.text.count("times more") == 1
