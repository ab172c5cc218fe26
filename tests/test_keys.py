"""Who may join: real TLS on 127.0.0.1, every kind of wrong certificate, and revocations that hold at once."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon import certificates, keys
from photon.errors import InputError, StateError
from photon.keys import (
    AuthenticationError,
    Identity,
    Revocations,
    bundle_identity,
    client_context,
    create_authority,
    issue_node,
    issue_operator,
    issued,
    peer_identity,
    renew_aggregator,
    revoke,
    server_context,
)

DEADLINE_S = 10.0
Peer = dict[str, Any]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a node `alice`, not to be changed."""
    folder = tmp_path_factory.mktemp("keys") / "keys"
    create_authority(folder)
    issue_node(folder, "alice")
    return folder


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


# The handshake


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


# Revocation


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


def test_after_a_revocation_a_new_key_counts_and_the_old_one_does_not(folder: Path) -> None:
    old = bundle_identity(folder / "alice.key").serial
    extra = issue_node(folder, "alice", out=folder / "second.key")
    assert sorted(revoke(folder, "alice")) == sorted([old, bundle_identity(extra).serial])
    new = bundle_identity(issue_node(folder, "alice")).serial  # in the place of the revoked one
    assert new not in (old, bundle_identity(extra).serial)
    assert [(one.name, one.role, one.revoked) for one in issued(folder)] == [
        ("aggregator", "aggregator", False),
        ("operator", "operator", False),
        ("alice", "node", True),
        ("alice", "node", True),
        ("alice", "node", False),
    ]
    peer = converse(server_context(folder), client_context(folder / "alice.key"))
    assert not Revocations(folder).is_revoked(peer_identity(peer).serial)
    peer = converse(server_context(folder), client_context(extra))  # the handshake passes: it does not know the list
    assert Revocations(folder).is_revoked(peer_identity(peer).serial)


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


def test_what_cannot_be_revoked(folder: Path) -> None:
    with pytest.raises(InputError, match="'bob'; it has to: alice, operator"):
        revoke(folder, "bob")
    with pytest.raises(InputError, match="cannot be revoked"):
        revoke(folder, "aggregator")
    assert revoke(folder, "operator") == [bundle_identity(folder / "operator.key").serial]


def test_two_changes_at_once_lose_nothing(folder: Path) -> None:
    names = [f"node-{index}" for index in range(12)]
    threads = [threading.Thread(target=issue_node, args=(folder, name), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(one.name for one in issued(folder)) == sorted([*names, "aggregator", "alice", "operator"])


def test_a_folder_that_stays_busy_is_said_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_LOCK_DEADLINE_S", 0.0)
    with keys._locked(folder), pytest.raises(InputError, match="another photon keys is at work"):
        revoke(folder, "alice")
    assert len(revoke(folder, "alice")) == 1


def test_a_certificate_is_recorded_before_its_key_exists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a crash in between would leave a key that nobody can revoke."""
    write = keys.write_private

    def failing(path: Path, data: bytes, *, replace: bool = False) -> None:
        if path.suffix == ".key":
            raise InputError("the disk is full")
        write(path, data, replace=replace)

    monkeypatch.setattr(keys, "write_private", failing)
    with pytest.raises(InputError, match="full"):
        issue_node(folder, "bob")
    assert issued(folder)[-1].name == "bob"
    assert not (folder / "bob.key").exists()


def test_a_damaged_record_is_named(folder: Path) -> None:
    path = folder / "issued.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(StateError, match=r"issued\.jsonl, line 3 is damaged"):
        issued(folder)


# Renewal


def test_a_renewed_aggregator_is_reached_by_the_keys_that_are_out_there(folder: Path) -> None:
    revoke(folder, "operator")  # and what was revoked stays so
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    server = server_context(folder)
    assert renew_aggregator(folder, ["photon.example.org", "127.0.0.2"], days=30) == ["photon.example.org", "127.0.0.2"]
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"aggregator.pem", "issued.jsonl"}
    assert after["issued.jsonl"].startswith(before["issued.jsonl"])
    assert (issued(folder)[-1].not_after - certificates.now()).days in (29, 30)
    for name in ("alice.key", "operator.key"):
        client = client_context(folder / name)
        assert not refused(server_context(folder), client, "photon.example.org")
        assert not refused(server_context(folder), client, "127.0.0.2")
        assert refused(server_context(folder), client, "localhost")
        assert not refused(server, client, "localhost")  # the certificate before cannot be called back


def test_a_renewal_keeps_the_hosts_and_outlives_an_expired_certificate(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = issued(folder)[0].not_after
    renew_aggregator(folder, ["localhost", "10.0.0.1", "::1"], days=1)
    at(monkeypatch, 2)
    with pytest.raises(InputError, match=r"aggregator\.pem expired on .*photon keys aggregator DIR"):
        server_context(folder)
    assert renew_aggregator(folder) == ["localhost", "10.0.0.1", "::1"]
    assert issued(folder)[-1].not_after == end
    at(monkeypatch, 0)
    (folder / "aggregator.pem").unlink()
    with pytest.raises(InputError, match=r"aggregator\.pem cannot be read.*--host"):
        renew_aggregator(folder)
    shutil.copy(folder / "operator.key", folder / "aggregator.pem")  # would give a certificate for no host at all
    with pytest.raises(InputError, match=r"no server's certificate.*--host"):
        renew_aggregator(folder)
    renew_aggregator(folder, ["localhost"])
    assert not refused(server_context(folder), client_context(folder / "alice.key"))


def test_what_cannot_be_renewed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for hosts, days, why in (
        (["https://a.org"], None, "neither a DNS name"),
        ([], 0, "1 to"),
        ([], keys.AUTHORITY_DAYS + 1, "fewer --days"),
    ):
        with pytest.raises(InputError, match=why):
            renew_aggregator(folder, hosts, days)
    at(monkeypatch, keys.AUTHORITY_DAYS + 1)
    with pytest.raises(InputError, match=r"the authority in .* expired"):
        renew_aggregator(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    record = folder / "issued.jsonl"
    record.write_bytes(record.read_bytes()[:-30])
    with pytest.raises(StateError, match="is damaged"):
        renew_aggregator(folder)
    assert (folder / "aggregator.pem").read_bytes() == before["aggregator.pem"]


def test_another_operator_and_one_in_the_place_of_a_revoked_one(folder: Path) -> None:
    with pytest.raises(InputError, match=r"operator\.key exists.*photon keys revoke operator"):
        issue_operator(folder)
    second = bundle_identity(issue_operator(folder, folder / "second.key"))
    assert (second.name, second.role) == ("operator", "operator")
    assert peer_identity(converse(server_context(folder), client_context(folder / "second.key"))) == second
    assert issued(folder)[-1].not_after == issued(folder)[1].not_after
    assert second.serial in revoke(folder, "operator")
    with pytest.raises(InputError, match=r"alice\.key exists"):  # another's key, however many operators are revoked
        issue_operator(folder, folder / "alice.key")
    third = bundle_identity(issue_operator(folder))
    assert [Revocations(folder).is_revoked(one.serial) for one in (second, third)] == [True, False]
