"""Certificates and their files: nobody else can read them, none is overwritten, and a damaged one is refused."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tests import authorities
from tests.authorities import at

from photon import certificates, keys
from photon.errors import InputError
from photon.identity import client_context, server_context
from photon.keys import create_authority, issue_node, issued, revoke

ready, folder = authorities.ready, authorities.folder


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_nothing_is_readable_by_others(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        create_authority(tmp_path / "keys")
        issue_node(tmp_path / "keys", "alice")
        issue_node(tmp_path / "keys", "bob", out=tmp_path / "bob.key")
        revoke(tmp_path / "keys", "alice")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(found.values()) == {0o600}
    assert {"ca.key", "ca.crt", "aggregator.pem", "operator.key", "issued.jsonl", "revoked.txt", "alice.key"} < set(
        found
    )
    assert "bob.key" in found


def test_only_the_authority_holds_the_authoritys_key(ready: Path) -> None:
    secret = load_pem_private_key((ready / "ca.key").read_bytes(), None).public_key()
    for name in ("aggregator.pem", "operator.key", "alice.key"):
        text = (ready / name).read_bytes()
        assert text.count(b"PRIVATE KEY-----") == 2
        assert load_pem_private_key(text, None).public_key() != secret
        assert [one.subject for one in x509.load_pem_x509_certificates(text)][1] == x509.load_pem_x509_certificate(
            (ready / "ca.crt").read_bytes()
        ).subject


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_may_touch_is_refused(folder: Path, mode: int) -> None:
    for name, use in {"alice.key": client_context, "aggregator.pem": lambda path: server_context(path.parent)}.items():
        (folder / name).chmod(mode)
        with pytest.raises(InputError, match=rf"{name}.*mode {mode:04o}.*chmod 600"):
            use(folder / name)
        (folder / name).chmod(0o600)
        use(folder / name)
    (folder / "ca.key").chmod(mode)
    with pytest.raises(InputError, match=r"ca\.key.*chmod 600"):
        issue_node(folder, "bob")


def blocks(text: str) -> list[str]:
    return [f"-----BEGIN {block}" for block in text.split("-----BEGIN ")[1:]]


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "flipped", "no authority", "another key", "another authority", "reordered", "a text"]
)
def test_a_damaged_bundle_is_refused_without_a_word_of_its_key(folder: Path, damage: str) -> None:
    path, other = folder / "alice.key", issue_node(folder, "bob")
    create_authority(folder / "other")
    text = path.read_text()
    key, certificate, ca = blocks(text)
    middle = key.index("\n") + 60  # inside the private number
    path.write_text(
        {
            "empty": "",
            "cut": text[: len(text) // 2],
            "flipped": text.replace(key, key[:middle] + ("B" if key[middle] == "A" else "A") + key[middle + 1 :]),
            "no authority": key + certificate,
            "another key": blocks(other.read_text())[0] + certificate + ca,
            "another authority": key + certificate + (folder / "other" / "ca.crt").read_text(),
            "reordered": key + ca + certificate,
            "a text": "hospital",
        }[damage]
    )
    with pytest.raises(InputError, match=r"alice\.key is damaged") as caught:
        client_context(path)
    shown = f"{caught.value!r} {caught.getrepr(showlocals=False)}"
    assert caught.value.__cause__ is None
    assert not any(line in shown for line in key.splitlines()[1:-1])


def test_no_repr_shows_a_key(ready: Path) -> None:
    pair = certificates.load_authority(ready / "ca.key", ready / "ca.crt")
    shown = repr(pair) + repr(certificates.load_bundle(ready / "alice.key"))
    assert "rivate" not in shown and "BEGIN" not in shown


def test_other_files_are_refused(ready: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        client_context(tmp_path / "none.key")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InputError, match="is not a file"):
        client_context(tmp_path / "pipe")
    certificates.write_private(tmp_path / "large", b"x" * (2**20 + 1))
    with pytest.raises(InputError, match="larger"):
        client_context(tmp_path / "large")
    for use in (issued, lambda path: issue_node(path, "a"), lambda path: revoke(path, "a")):
        with pytest.raises(InputError, match="photon keys init"):
            use(tmp_path)
    with pytest.raises(InputError, match=r"aggregator\.pem"):
        server_context(tmp_path)
    shutil.copy(ready / "alice.key", tmp_path / "aggregator.pem")
    with pytest.raises(InputError, match="not the certificate of an Aggregator"):
        server_context(tmp_path)


# What is never overwritten, and what is asked wrongly


def test_no_key_is_overwritten(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="not empty"):
        create_authority(folder)
    with pytest.raises(InputError, match="exists and is not overwritten"):
        issue_node(folder, "alice")
    revoke(folder, "alice")
    for path in (folder / "operator.key", folder / "ca.key", folder / "revoked.txt", folder / "alice.key"):
        with pytest.raises(InputError, match="exists and is not overwritten"):
            issue_node(folder, "bob", out=path)  # alice's is revoked, but it is not bob's
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists and is not overwritten"):
        issue_node(folder, "bob", out=tmp_path / "link")
    with pytest.raises(InputError, match="exists and is not overwritten"):
        certificates.write_private(folder / "ca.key", b"")  # whatever the callers forgot to ask
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"revoked.txt"}


def test_an_expired_key_may_be_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (folder / "alice.key").read_bytes()
    at(monkeypatch, keys.NODE_DAYS + 1)
    assert issue_node(folder, "alice").read_bytes() != old


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "..", "a\n", "é", "a" * 65, "operator", "Aggregator", "ca"])
def test_names_that_no_node_can_have(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name of a node"):
        issue_node(folder, name)
    assert len(issued(folder)) == 3


@pytest.mark.parametrize(
    "host", ["", "https://a.org", "a.org:443", "*.a.org", "a..org", "-a", "a_b", "10.0.0.300", "a" * 64, "ä.org", "a\n"]
)
def test_hosts_that_are_none(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="neither a DNS name nor an IP address"):
        create_authority(tmp_path / "keys", [host])
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("host", ["a", "node7", "Photon.Example.org", "3com.org", "::1", "2001:db8::7", "203.0.113.7"])
def test_hosts_that_are_some(tmp_path: Path, host: str) -> None:
    create_authority(tmp_path / "keys", [host])
    certificate = certificates.load_bundle(tmp_path / "keys" / "aggregator.pem").certificate
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == [host.lower()]


def test_how_long_a_certificate_may_count(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for days in (0, -1, keys.MAX_DAYS + 1):
        with pytest.raises(InputError, match=f"{days} days: "):
            create_authority(tmp_path / "none", days=days)
        with pytest.raises(InputError, match=f"{days} days: "):
            issue_node(folder, "bob", days=days)
    with pytest.raises(InputError, match="give at least one host"):
        create_authority(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()
    create_authority(tmp_path / "short", days=30)
    with pytest.raises(InputError, match="before 31 days are over"):
        issue_node(tmp_path / "short", "bob", days=31)
    issue_node(tmp_path / "short", "bob")
    authority_end = next(one.not_after for one in issued(tmp_path / "short"))
    assert issued(tmp_path / "short")[-1].not_after == authority_end
    at(monkeypatch, 31)
    with pytest.raises(InputError, match=r"the authority in .* expired"):
        issue_node(tmp_path / "short", "carol")


def test_a_place_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        issue_node(folder, "bob", out=tmp_path / "none" / "bob.key")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be used for keys"):
        create_authority(tmp_path / "file")
    assert len(issued(folder)) == 3
