"""What an authority issues, revokes and renews, and what a damaged or busy folder of keys does to that."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tests import authorities
from tests.authorities import DEADLINE_S, at, converse, refused

from photon import certificates, keys
from photon.errors import InputError, StateError
from photon.identity import Revocations, bundle_identity, client_context, peer_identity, server_context
from photon.keys import issue_node, issue_operator, issued, renew_aggregator, revoke

ready, folder = authorities.ready, authorities.folder


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


def test_what_cannot_be_revoked(folder: Path) -> None:
    with pytest.raises(InputError, match="'bob'; it has to: alice, operator"):
        revoke(folder, "bob")
    with pytest.raises(InputError, match="cannot be revoked"):
        revoke(folder, "aggregator")
    assert revoke(folder, "operator") == [bundle_identity(folder / "operator.key").serial]


def test_a_list_that_was_mended_in_an_editor_can_be_added_to(folder: Path) -> None:
    """One that leaves the last line without its end; after that, nobody at all was admitted."""
    revoke(folder, "operator")
    for name in ("revoked.txt", "issued.jsonl"):
        (folder / name).write_bytes((folder / name).read_bytes().rstrip(b"\n"))
    revoke(folder, "alice")
    issue_node(folder, "bob")
    assert {one.name: one.revoked for one in issued(folder)} == {
        "aggregator": False, "operator": True, "alice": True, "bob": False,
    }  # fmt: skip


def test_the_keys_of_another_user_are_said_to_be_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def refused(path: Path, **options: Any) -> os.stat_result:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    for use in (issued, lambda where: revoke(where, "alice"), lambda where: issue_node(where, "bob")):
        with pytest.raises(InputError, match="cannot be read: Permission denied; it is its owner's alone"):
            use(folder)


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
