"""Who may join: real TLS on 127.0.0.1, every kind of wrong certificate, and revocations that hold at once."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import authorities
from tests.authorities import Peer, at, converse, loose_client, refused

from photon import keys
from photon.errors import InputError, StateError
from photon.identity import (
    AuthenticationError,
    Identity,
    Revocations,
    bundle_identity,
    client_context,
    peer_identity,
    server_context,
)
from photon.keys import create_authority, issue_node, issued, revoke

ready, folder = authorities.ready, authorities.folder


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_node_joins_under_the_name_in_its_certificate(ready: Path, host: str) -> None:
    bundle = ready / "alice.key"
    identity = peer_identity(converse(server_context(ready), client_context(bundle), host))
    assert identity == bundle_identity(bundle)
    assert (identity.name, identity.role) == ("alice", "node")
    assert identity.serial == next(one.serial for one in issued(ready) if one.name == "alice")


def test_the_operator_is_no_node(ready: Path) -> None:
    peer = converse(server_context(ready), client_context(ready / "operator.key"))
    assert peer_identity(peer) == bundle_identity(ready / "operator.key")
    assert peer_identity(peer).role == "operator"


def test_who_shows_nothing_is_refused(ready: Path) -> None:
    server, client = server_context(ready), loose_client(ready, None)
    assert refused(server, client)
    server.verify_mode = ssl.CERT_OPTIONAL  # the mutant: the handshake passes, and only peer_identity is left
    with pytest.raises(AuthenticationError, match="showed no certificate"):
        peer_identity(converse(server, client))
    with pytest.raises(AuthenticationError):
        peer_identity(None)


def test_another_authority_is_refused_on_both_sides(ready: Path, tmp_path: Path) -> None:
    create_authority(tmp_path / "other")
    theirs = issue_node(tmp_path / "other", "alice")
    assert refused(server_context(ready), loose_client(ready, theirs))  # the server refuses the client
    assert refused(server_context(tmp_path / "other"), client_context(ready / "alice.key"))  # and the client the server
    assert not refused(server_context(tmp_path / "other"), client_context(theirs))


def test_an_expired_certificate_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, -10)
    late = issue_node(folder, "late", days=3)
    at(monkeypatch, 0)
    with pytest.raises(InputError, match=r"late\.key expired on 20.*photon keys node late"):
        client_context(late)
    assert bundle_identity(late).name == "late"
    assert refused(server_context(folder), loose_client(folder, late))
    assert not refused(server_context(folder), loose_client(folder, folder / "alice.key"))


def test_a_certificate_that_expires_while_its_connection_is_open(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = converse(server_context(ready), client_context(ready / "alice.key"))
    at(monkeypatch, keys.NODE_DAYS - 1)
    assert peer_identity(peer).name == "alice"
    at(monkeypatch, keys.NODE_DAYS + 1)
    with pytest.raises(AuthenticationError, match="alice has expired"):
        peer_identity(peer)


def test_an_expired_aggregator_says_so_before_anyone_connects(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, keys.AUTHORITY_DAYS + 1)
    with pytest.raises(InputError, match=r"aggregator\.pem expired on .*authority has, too.*photon keys init"):
        server_context(ready)
    at(monkeypatch, -1)
    with pytest.raises(InputError, match="clock"):
        client_context(ready / "alice.key")


def test_a_server_of_another_name_is_refused(ready: Path, tmp_path: Path) -> None:
    create_authority(tmp_path / "named", ["photon.example.org", "127.0.0.2"])
    server, client = server_context(tmp_path / "named"), client_context(issue_node(tmp_path / "named", "alice"))
    assert not refused(server, client, "photon.example.org")
    assert not refused(server, client, "127.0.0.2")
    for host in ("localhost", "127.0.0.1", "example.org", "x.photon.example.org", "aggregator"):
        assert refused(server, client, host), host
    create_authority(tmp_path / "address", ["127.0.0.1"])  # its subject is no host name, even where there is no other
    address = client_context(issue_node(tmp_path / "address", "alice"))
    assert not refused(server_context(tmp_path / "address"), address, "127.0.0.1")
    assert refused(server_context(tmp_path / "address"), address, "aggregator")
    client.check_hostname = False  # the mutant: whoever has any certificate of the authority is the Aggregator
    assert not refused(server, client, "localhost")


def test_a_node_cannot_pose_as_the_aggregator(folder: Path) -> None:
    """Nobody may answer with its own key in the Aggregator's place, even where the name would fit."""
    bundle = issue_node(folder, "localhost")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(bundle)
    client = client_context(folder / "alice.key")
    client.check_hostname = False
    assert refused(server, client)


def test_nothing_older_than_tls_1_3(ready: Path) -> None:
    old = loose_client(ready, ready / "alice.key")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert refused(server_context(ready), old)
    server = server_context(ready)
    server.minimum_version, server.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    assert refused(server, client_context(ready / "alice.key"))


def test_the_aggregators_certificate_is_no_client(ready: Path) -> None:
    """Refused by its purpose in the handshake, by its role in peer_identity, and by its own side before both."""
    server, client = server_context(ready), loose_client(ready, ready / "aggregator.pem")
    assert refused(server, client)
    with pytest.raises(InputError, match="Aggregator's own"):
        client_context(ready / "aggregator.pem")
    client = client_context(ready / "alice.key")
    seen: list[Peer] = []
    client.check_hostname = False

    class Watching(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            seen.append(self.getpeercert() or {})

    client.sslsocket_class = Watching
    converse(server, client)
    with pytest.raises(AuthenticationError, match="Aggregator's own certificate"):
        peer_identity(seen[0])


PEER: Peer = {
    "subject": ((("organizationName", "photon node"),), (("commonName", "alice"),)),
    "serialNumber": "0A1B",
    "notAfter": "Jan  1 00:00:00 2100 GMT",
}
ODD: dict[str, Peer] = {
    "no organization": {**PEER, "subject": ((("commonName", "alice"),),)},
    "no name": {**PEER, "subject": ((("organizationName", "photon node"),),)},
    "two names": {**PEER, "subject": (*PEER["subject"], (("commonName", "bob"),))},
    "another organization": {**PEER, "subject": ((("organizationName", "acme"),), (("commonName", "alice"),))},
    "another field": {**PEER, "subject": (*PEER["subject"], (("countryName", "DE"),))},
    "a path for a name": {**PEER, "subject": (PEER["subject"][0], (("commonName", "../alice"),))},
    "a new line in the name": {**PEER, "subject": (PEER["subject"][0], (("commonName", "alice\n"),))},
    "no subject": {key: value for key, value in PEER.items() if key != "subject"},
    "a subject of no shape": {**PEER, "subject": (("commonName",),)},
    "no serial": {key: value for key, value in PEER.items() if key != "serialNumber"},
    "a serial that is no number": {**PEER, "serialNumber": "xyz"},
    "no end": {key: value for key, value in PEER.items() if key != "notAfter"},
    "an odd end": {**PEER, "notAfter": "some day"},
}


def test_a_peer_is_who_its_certificate_says() -> None:
    assert peer_identity(PEER) == Identity("alice", "node", "a1b")


@pytest.mark.parametrize("case", ODD)
def test_an_odd_certificate_is_nobody(case: str) -> None:
    with pytest.raises(AuthenticationError):
        peer_identity(ODD[case])


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority that goes on issuing."""
    folder = tmp_path_factory.mktemp("busy") / "keys"
    create_authority(folder)
    return folder


@settings(max_examples=25, deadline=None)
@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True), hours=st.integers(0, 2))
def test_every_name_survives_the_way_through_its_certificate(busy: Path, name: str, hours: int) -> None:
    if name.lower() in keys.RESERVED_NAMES:
        return
    bundle = issue_node(busy, name, days=1 + hours, out=busy / f"bundle-{os.urandom(8).hex()}.key")
    assert peer_identity(converse(server_context(busy), client_context(bundle))) == bundle_identity(bundle)
    entry = issued(busy)[-1]
    assert (entry.name, entry.serial) == (name, bundle_identity(bundle).serial)


def test_a_revocation_holds_for_the_next_question(folder: Path) -> None:
    serial = bundle_identity(folder / "alice.key").serial
    revocations, mutant = Revocations(folder), Revocations(folder)
    assert not revocations.is_revoked(serial)
    once = mutant.is_revoked(serial)  # the mutant asks once for each connection
    assert revoke(folder, "alice") == [serial]
    assert revocations.is_revoked(serial)
    assert revocations.is_revoked("0" + serial.upper())  # as OpenSSL writes it
    assert not once
    assert not revocations.is_revoked(bundle_identity(folder / "operator.key").serial)
    assert revoke(folder, "alice") == []
    assert (folder / "revoked.txt").read_text().count(serial) == 1


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "cut in a serial": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "cut in a name": lambda path: path.write_bytes(path.read_bytes().split(b"ali")[0] + b"ali"),
    "cut in a date": lambda path: path.write_bytes(path.read_bytes()[:-18]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00\n"),
    "a serial that is none": lambda path: path.write_text("0x12 alice 2026-01-01\n"),
    "a zero before a serial": lambda path: path.write_text("012 alice 2026-01-01\n"),
    "a name alone": lambda path: path.write_text("alice\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_list_that_cannot_be_read_admits_nobody(folder: Path, damage: str) -> None:
    """It fails closed, goes on failing, and counts again once it is mended."""
    path = folder / "revoked.txt"
    revoke(folder, "alice")
    revocations = Revocations(folder)
    assert not revocations.is_revoked("1")
    whole = path.read_bytes()
    DAMAGES[damage](path)
    for _ in range(2):
        with pytest.raises(StateError, match=r"revoked\.txt.*nobody is admitted"):
            revocations.is_revoked("1")
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    assert not revocations.is_revoked("1")
