"""A bucket as the store, against a real S3 endpoint on this machine: what nodes can do, and what they cannot."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.link.buckets import PART, SECRET, Gateway, Made, downloaded, needs_bucket, put, read, send, sha256_of

from photon.errors import ConfigError
from photon.link.body import FileBody, whole_file
from photon.link.boot import MARKER
from photon.link.object_store import PART_BYTES, ObjectStore, open_store
from photon.link.store import (
    BlobDamagedError,
    BlobError,
    BlobIncompleteError,
    BlobRefusedError,
    BlobTooLargeError,
    FolderStore,
)
from photon.link.transfer import download, upload

pytestmark = needs_bucket


# Down


@pytest.mark.parametrize("size", [0, 1, PART, 3 * PART + 5])
def test_what_is_published_is_read_by_anybody_with_its_url(made: Made, size: int) -> None:
    body = os.urandom(size)
    name = sha256_of(body)
    assert made.gateway.locate(name) is None
    made.loop.publish(name, body)
    location = made.gateway.locate(name)
    assert location is not None
    assert downloaded(location) == body
    assert [part.end - part.begin for part in location.parts[:-1]] == [PART] * (len(location.parts) - 1)
    assert made.loop.published() == {name}
    made.loop.retract(name)
    made.loop.retract(name)
    assert made.loop.published() == set()
    assert made.gateway.locate(name) is None


def test_a_stretch_of_a_file_is_published_as_bytes_are(made: Made, tmp_path: Path) -> None:
    made.gateway = made.store(part_bytes=2**22)
    content = os.urandom(17 * 2**20)
    (tmp_path / "file").write_bytes(content)
    body = content[1000:-1000]
    made.loop.publish(sha256_of(body), FileBody(tmp_path / "file", 1000, len(body)))
    location = made.gateway.locate(sha256_of(body))
    assert location is not None
    assert downloaded(location) == body


def test_publishing_again_sends_nothing(made: Made) -> None:
    body = os.urandom(100)
    made.loop.publish(sha256_of(body), body)
    another = made.store()
    with mock.patch.object(another._bucket, "put", side_effect=AssertionError("sent again")):
        another.publish(sha256_of(body), body)


@pytest.mark.parametrize("size", [100, 9 * 2**20])
def test_a_body_that_is_not_its_sha256_never_appears(made: Made, size: int) -> None:
    body = os.urandom(size)
    with pytest.raises(BlobError, match="was to be published as"):
        made.loop.publish(sha256_of(body + b"!"), body)
    assert made.keys() == {}


# Up


def test_an_upload_goes_on_with_the_parts_that_are_missing(made: Made) -> None:
    body = os.urandom(3 * PART + 100)
    name = sha256_of(body)
    made.allow("ada", len(body))
    location = made.gateway.begin_upload("ada", name, len(body))
    assert [(part.begin, part.end, part.done) for part in location.parts] == [
        (begin, min(len(body), begin + PART), 0) for begin in range(0, len(body), PART)
    ]
    put(location.parts[1], body[PART : 2 * PART])
    with pytest.raises(BlobIncompleteError, match="3 of 4 parts"):
        made.gateway.finish_upload("ada", name)
    with pytest.raises(BlobError, match="has not uploaded"):
        made.loop.fetch("ada", name, len(body))

    restarted = made.store()
    location = restarted.begin_upload("ada", name, len(body))
    assert [part.done for part in location.parts] == [0, PART, 0, 0]
    assert send(location, body) == len(body) - PART
    restarted.finish_upload("ada", name)
    restarted.finish_upload("ada", name)
    assert [part.done for part in restarted.begin_upload("ada", name, len(body)).parts] == [PART, PART, PART, 100]

    assert read(made.loop.fetch("ada", name, len(body))) == body
    with pytest.raises(BlobError, match="bytes, 5 were announced"):
        made.loop.fetch("ada", name, 5)


def test_an_upload_is_downloaded_once_and_goes_with_the_round(made: Made) -> None:
    body = os.urandom(PART + 1)
    name = made.uploaded("ada", body)
    first = made.loop.fetch("ada", name, len(body))
    with mock.patch.object(made.loop._bucket, "read", side_effect=AssertionError("read again")):
        assert made.loop.fetch("ada", name, len(body)) == first
    made.loop.discard("ada")
    made.loop.discard("ada")
    assert made.keys() == {}
    assert [path.name for path in made.workspace.rglob("*") if path.is_file()] == [MARKER]
    with pytest.raises(BlobError, match="has not uploaded"):
        made.loop.fetch("ada", name, len(body))
    with pytest.raises(BlobRefusedError, match="no task asks"):
        made.gateway.begin_upload("ada", name, len(body))


def test_an_empty_upload_is_an_upload(made: Made) -> None:
    name = made.uploaded("ada", b"")
    assert read(made.loop.fetch("ada", name, 0)) == b""


def test_an_oversized_part_is_refused_and_removed(made: Made) -> None:
    """A signed PUT does not bound what is put, so this is the place where a lie about the size is found."""
    body = os.urandom(2 * PART)
    name = sha256_of(body)
    made.allow("ada", len(body))
    location = made.gateway.begin_upload("ada", name, len(body))
    put(location.parts[0], body[:PART])
    put(location.parts[1], body[PART:] + bytes(100 * PART))
    with pytest.raises(BlobTooLargeError, match="larger than it said"):
        made.gateway.finish_upload("ada", name)
    assert made.keys("up") == {f"up/ada/{name}/00000": PART}

    put(location.parts[1], body[PART:] + b"!")
    location = made.gateway.begin_upload("ada", name, len(body))
    assert [part.done for part in location.parts] == [PART, 0]
    assert made.keys("up") == {f"up/ada/{name}/00000": PART}
    send(location, body)
    made.gateway.finish_upload("ada", name)
    assert read(made.loop.fetch("ada", name, len(body))) == body


def test_a_short_part_is_missing(made: Made) -> None:
    body = os.urandom(2 * PART)
    made.allow("ada")
    location = made.gateway.begin_upload("ada", sha256_of(body), len(body))
    put(location.parts[0], body[:PART])
    put(location.parts[1], body[PART:-1])
    with pytest.raises(BlobIncompleteError, match="1 of 2 parts"):
        made.gateway.finish_upload("ada", sha256_of(body))


def test_wrong_bytes_of_the_right_size_are_refused_and_removed(made: Made) -> None:
    body = os.urandom(2 * PART)
    name = sha256_of(body)
    flipped = bytearray(body)
    flipped[PART + 7] ^= 1
    made.allow("ada")
    send(made.gateway.begin_upload("ada", name, len(body)), bytes(flipped))
    made.gateway.finish_upload("ada", name)
    with pytest.raises(BlobDamagedError, match="not what it claims"):
        made.loop.fetch("ada", name, len(body))
    assert made.keys() == {}
    assert not (made.workspace / "up" / "ada" / name).exists()
    assert sum(part.done for part in made.gateway.begin_upload("ada", name, len(body)).parts) == 0


def test_what_is_put_after_the_upload_is_finished_does_not_count(made: Made) -> None:
    """The URLs are still good then. More bytes are not read; other bytes are found."""
    body = os.urandom(2 * PART)
    name = sha256_of(body)
    made.allow("ada")
    location = made.gateway.begin_upload("ada", name, len(body))
    send(location, body)
    made.gateway.finish_upload("ada", name)
    put(location.parts[1], body[PART:] + bytes(50 * PART))
    assert read(made.loop.fetch("ada", name, len(body))) == body
    put(location.parts[0], bytes(PART))
    (made.workspace / "up" / "ada" / name).unlink()
    with pytest.raises(BlobDamagedError):
        made.loop.fetch("ada", name, len(body))


def test_a_node_has_one_finished_and_one_unfinished_upload_at_most(made: Made) -> None:
    bodies = [os.urandom(2 * PART) for _ in range(3)]
    names = [sha256_of(body) for body in bodies]
    made.uploaded("ada", bodies[0])
    put(made.gateway.begin_upload("ada", names[1], 2 * PART).parts[0], bodies[1][:PART])
    put(made.gateway.begin_upload("ada", names[2], 2 * PART).parts[0], bodies[2][:PART])
    kept = [f"up/ada/{names[0]}/00000", f"up/ada/{names[0]}/00001", f"up/ada/{names[2]}/00000"]
    assert sorted(made.keys("up")) == sorted(kept)
    with pytest.raises(BlobIncompleteError, match="not begun"):
        made.gateway.finish_upload("ada", names[1])
    assert read(made.loop.fetch("ada", names[0], 2 * PART)) == bodies[0]

    send(made.gateway.begin_upload("ada", names[2], 2 * PART), bodies[2])
    made.gateway.finish_upload("ada", names[2])
    assert sorted(made.keys("up")) == [f"up/ada/{names[2]}/00000", f"up/ada/{names[2]}/00001"]
    assert read(made.loop.fetch("ada", names[2], 2 * PART)) == bodies[2]
    assert not (made.workspace / "up" / "ada" / names[0]).exists()


def test_nodes_do_not_meet(made: Made) -> None:
    body = os.urandom(PART + 1)
    name = made.uploaded("bob", body)
    made.uploaded("bob2", body)
    assert made.gateway.locate(name) is None
    assert made.loop.published() == set()
    made.allow("ada")
    location = made.gateway.begin_upload("ada", name, len(body))
    assert [part.done for part in location.parts] == [0, 0]
    assert all("/up/ada/" in part.url for part in location.parts)
    with pytest.raises(BlobIncompleteError):
        made.gateway.finish_upload("ada", name)
    made.loop.discard("bob")  # a prefix of another name, which must not go with it
    assert {key.split("/")[1] for key in made.keys("up")} == {"bob2"}
    assert read(made.loop.fetch("bob2", name, len(body))) == body


def test_without_a_valid_ticket_nothing_is_signed(made: Made) -> None:
    body = os.urandom(1000)
    name = sha256_of(body)
    with mock.patch.object(made.gateway._bucket, "sign", side_effect=AssertionError("signed")):
        with pytest.raises(BlobRefusedError, match="no task asks"):
            made.gateway.begin_upload("ada", name, 1000)
        made.allow("ada", 999)
        for size in (1000, 2**62, -1):
            with pytest.raises(BlobTooLargeError, match="999"):
                made.gateway.begin_upload("ada", name, size)
        made.loop.allow("ada", 1000, time.time() - 1)
        with pytest.raises(BlobRefusedError, match="over"):
            made.gateway.begin_upload("ada", name, 1000)
    made.allow("ada", 1000)
    send(made.gateway.begin_upload("ada", name, 1000), body)
    made.loop.allow("ada", 1000, time.time() - 1)
    with pytest.raises(BlobRefusedError, match="over"):
        made.gateway.finish_upload("ada", name)


@pytest.mark.parametrize("name", ["", "..", "a" * 63, "A" * 64, "a" * 65, "../" + "a" * 61, "a" * 64 + "\n"])
def test_a_name_that_is_no_sha256_leads_nowhere(made: Made, name: str) -> None:
    made.allow("ada")
    assert made.gateway.locate(name) is None
    for call in (
        lambda: made.loop.publish(name, b""),
        lambda: made.loop.retract(name),
        lambda: made.gateway.begin_upload("ada", name, 1),
        lambda: made.gateway.finish_upload("ada", name),
        lambda: made.loop.fetch("ada", name, 1),
        lambda: made.loop.fetch("../ada", "a" * 64, 1),
        lambda: made.loop.discard("../ada"),
    ):
        with pytest.raises(BlobRefusedError):
            call()
    assert made.keys() == {}


@given(st.integers(0, 2**46))
def test_parts_tile_a_blob_of_any_size(size: int) -> None:
    store = ObjectStore.__new__(ObjectStore)
    store._part_bytes = PART_BYTES
    bounds = store._bounds(size)
    assert [low for low, _ in bounds] == [0, *(high for _, high in bounds)][: len(bounds)]
    assert (bounds[-1][1] if bounds else 0) == size
    assert all(0 < high - low <= max(PART_BYTES, 4 * size / 512) for low, high in bounds)
    assert len(bounds) <= 512


# The node's own code


def test_a_node_downloads_and_uploads(made: Made, tmp_path: Path) -> None:
    body = os.urandom(5 * PART + 3)
    name = sha256_of(body)
    made.loop.publish(name, body)
    node = Gateway(made.gateway, "ada")
    base = tmp_path / "base"
    assert download(node, name, base, streams=3, deadline_s=30) == len(body)
    assert base.read_bytes() == body
    made.allow("ada", len(body))
    put(made.gateway.begin_upload("ada", name, len(body)).parts[2], body[2 * PART : 3 * PART])
    assert upload(node, name, whole_file(base), streams=3, deadline_s=30) == len(body) - PART
    assert read(made.loop.fetch("ada", name, len(body))) == body


# Which store a URL means


def test_a_url_means_a_store(credentials: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for url, root in (
        ("", tmp_path / "work"),
        ("gateway", tmp_path / "work"),
        (f"file://{tmp_path}/a%20shared%20folder", tmp_path / "a shared folder"),
    ):
        store = open_store(url, tmp_path / "work")
        assert isinstance(store, FolderStore)
        assert store.root == root
        assert root.is_dir()
    assert isinstance(open_store("s3://bucket/run", tmp_path / "work"), ObjectStore)
    for url in ("s3", "s3://", "ftp://host/x", "https://host/x", "memory:///", "file://", "file://host/x", "bucket"):
        with pytest.raises(ConfigError):
            open_store(url, tmp_path / "work")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/store cannot hold blobs: Not a directory"):
        open_store(f"file://{tmp_path}/file/store", tmp_path / "work")
    for url in (f"s3://me:{SECRET}@bucket/run", f"az://container/run?sig={SECRET}", f"s3://bucket/run#{SECRET}"):
        with pytest.raises(ConfigError, match="environment") as raised:
            open_store(url, tmp_path / "work")
        assert SECRET not in str(raised.value)
    with pytest.raises(ConfigError, match=r"az://container/run cannot be used: .*Account must be specified.*AZURE_"):
        open_store("az://container/run", tmp_path / "work")


@pytest.mark.parametrize("allowed", [True, False])
def test_plain_http_is_for_those_who_ask_for_it(made: Made, credentials: pytest.MonkeyPatch, allowed: bool) -> None:
    credentials.setenv("AWS_ALLOW_HTTP", str(allowed))
    store = open_store(made.url, made.workspace)
    if allowed:
        assert store.published() == set()
    else:
        with pytest.raises(BlobError):
            store.published()


def test_a_missing_library_is_named(credentials: pytest.MonkeyPatch, tmp_path: Path) -> None:
    credentials.setitem(sys.modules, "obstore", None)
    credentials.delitem(sys.modules, "photon.link.bucket", raising=False)
    assert isinstance(open_store("gateway", tmp_path), FolderStore)
    with pytest.raises(ConfigError, match=r"photon-federated\[objects\]"):
        open_store("s3://bucket/run", tmp_path)
