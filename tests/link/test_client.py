"""Small calls over connections that are kept; and what a failure of TLS says about which end to mend."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.authorities import at, authority_with
from tests.fabric.gateways import Site, in_thread
from tests.faults.proxy import Proxy
from tests.link.plain import plain_server

from photon.errors import ConfigError
from photon.identity import client_context
from photon.keys import issue_node, revoke
from photon.link.client import _OTHER_ADDRESS, _tls_sentence, check_status
from photon.link.transfer import GatewayClient, LinkDownError, LinkRefusedError

MIB = 2**20
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    with in_thread(site):
        yield site


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


NO_JSON = {"text": b"<html>", "no text": b"\xff\xfe\xff", "nested too deeply": b'{"a":[' * 100_000}


@pytest.mark.parametrize("answer", NO_JSON.values(), ids=NO_JSON)
def test_an_answer_that_is_no_json_is_worth_another_try(answer: bytes) -> None:
    with plain_server({"location": answer}) as port:
        client = GatewayClient(f"http://127.0.0.1:{port}", None)
        with pytest.raises(LinkDownError, match="did not answer GET /v1/blobs/x with JSON"):
            client.json("GET", "/v1/blobs/x")
        client.close()


@pytest.mark.parametrize("answer", NO_JSON.values(), ids=NO_JSON)
def test_a_failure_that_gives_no_reason_is_told_by_its_status(answer: bytes) -> None:
    with pytest.raises(LinkDownError, match="now: status 500"):
        check_status(500, answer, "GET /", "here")
    with pytest.raises(LinkRefusedError, match="refuses GET /: status 403"):
        check_status(403, answer, "GET /", "here")


# TLS: which end to mend


def refusal(client: GatewayClient) -> str:
    with pytest.raises(LinkRefusedError) as caught:
        client.json("GET", "/v1/run")
    return str(caught.value)


def test_a_node_without_a_certificate_is_told_so(site: Site) -> None:
    context = ssl.create_default_context(cafile=str(site.keys / "ca.crt"))
    assert "asks for a certificate" in refusal(GatewayClient(f"https://127.0.0.1:{site.port}", context, 5.0))


def test_a_certificate_of_another_federation_is_told_apart(site: Site, tmp_path: Path) -> None:
    keys = authority_with(tmp_path / "keys", "ada")
    url = f"https://127.0.0.1:{site.port}"
    context = client_context(keys / "ada.key")
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


@pytest.mark.parametrize(
    ("issued", "status", "told"), [(-100, 401, "has expired.*clock"), (100, 0, "or a clock is wrong")]
)
def test_a_key_that_does_not_count_by_the_clock_of_the_gateway_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, issued: float, status: int, told: str
) -> None:
    """The node's own clock says that it does. One that will count is no reason to give up."""
    at(monkeypatch, days=-400)
    site = Site(tmp_path)
    at(monkeypatch, days=issued)
    issue_node(site.keys, "eve", days=30)
    client = site.client("eve")
    at(monkeypatch, days=0)
    with in_thread(site):
        client = GatewayClient(f"https://127.0.0.1:{site.port}", client.context, 5.0)
        with pytest.raises(LinkRefusedError, match=told) as caught:
            client.json("GET", "/v1/run")
    assert caught.value.status == status


def test_a_port_that_speaks_no_tls_is_told(site: Site) -> None:
    with plain_server({}) as server:
        context = client_context(site.keys / "ada.key")
        assert "does not speak TLS" in refusal(GatewayClient(f"https://127.0.0.1:{server}", context, 5.0))


def test_nobody_there_is_worth_another_try(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LinkDownError, match="refused"):
        site.client(port=port).json("GET", "/v1/run")


@pytest.mark.parametrize("place", ["[2001:db8::1]", "[2001:db8::1]:8443"])
def test_the_host_to_renew_a_certificate_for_is_named_as_photon_keys_takes_it(place: str) -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code = _OTHER_ADDRESS
    assert str(_tls_sentence(error, place)).endswith("photon keys aggregator DIR --host 2001:db8::1")
