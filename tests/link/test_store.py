"""What nodes may read and write, and that the disk holds no more than the tickets say."""

from __future__ import annotations

import hashlib
import os
import time
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from photon.link import boot
from photon.link.body import FileBody, whole_file
from photon.link.store import (
    BlobDamagedError,
    BlobError,
    BlobIncompleteError,
    BlobRefusedError,
    BlobStore,
    BlobTooLargeError,
    FolderStore,
    Location,
    Part,
)

DATA = bytes(range(256)) * 40


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SHA = sha256(DATA)


def in_an_hour() -> float:
    return time.time() + 3600


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def send(store: FolderStore, node: str, data: bytes, name: str | None = None) -> None:
    """What the gateway does with an upload."""
    sha = name or sha256(data)
    store.begin_upload(node, sha, len(data))
    store.incoming(node, sha).write(0, 0, data)
    store.finish_upload(node, sha)


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Locations


@given(st.lists(st.integers(1, 1000), max_size=5), st.data())
def test_only_parts_that_tile_the_blob_are_a_location(sizes: list[int], data: st.DataObject) -> None:
    edges = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    parts = [Part(url="/x", begin=low, end=high) for low, high in pairwise(edges)]
    location = Location(bytes=edges[-1], parts=parts)
    assert Location.model_validate_json(location.model_dump_json()) == location
    with pytest.raises(ValidationError):
        Location(bytes=edges[-1] + 1, parts=parts)
    if parts:
        place = data.draw(st.integers(0, len(parts) - 1))
        with pytest.raises(ValidationError):
            Location(bytes=edges[-1], parts=[*parts[:place], *parts[place + 1 :]])
        with pytest.raises(ValidationError):
            Location(bytes=edges[-1], parts=[*parts[: place + 1], *parts[place:]])


@pytest.mark.parametrize("fields", [{"begin": 5, "end": 4}, {"begin": 0, "end": 4, "done": 5}, {"begin": -1, "end": 4}])
def test_a_part_has_an_order(fields: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Part(url="/x", **fields)


# Down


def test_a_published_blob_is_located_and_read_and_another_is_not(store: FolderStore) -> None:
    assert store.locate(SHA) is None
    store.publish(SHA, DATA)
    location = store.locate(SHA)
    assert location == Location(bytes=len(DATA), parts=[Part(url=f"/v1/blobs/{SHA}/data", begin=0, end=len(DATA))])
    body = store.published_file(SHA)
    assert body is not None
    assert bytes(body.read(0, len(DATA))) == DATA
    assert store.published() == {SHA}
    store.retract(SHA)
    store.retract(SHA)
    assert (store.locate(SHA), store.published(), store.published_file(SHA)) == (None, set(), None)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_memory_of_any_kind_is_published(store: FolderStore, kind: type) -> None:
    store.publish(SHA, kind(DATA))
    assert (store.root / "down" / SHA).read_bytes() == DATA


def test_a_whole_file_is_linked_and_a_stretch_of_one_is_copied(store: FolderStore, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.write_bytes(DATA)
    store.publish(SHA, whole_file(source))
    published = store.root / "down" / SHA
    assert published.stat().st_ino == source.stat().st_ino
    stretch = DATA[100:700]
    store.publish(sha256(stretch), FileBody(source, 100, 600))
    assert (store.root / "down" / sha256(stretch)).read_bytes() == stretch
    assert source.stat().st_nlink == 2


def test_publishing_again_changes_nothing_and_a_new_process_writes_what_a_power_cut_may_have_lost(
    store: FolderStore,
) -> None:
    published = store.root / "down" / SHA
    store.publish(SHA, DATA)
    first = published.stat().st_ino
    store.publish(SHA, DATA)
    assert published.stat().st_ino == first
    published.write_bytes(bytes(len(DATA)))  # of the right size, and empty pages: as after a power cut
    FolderStore(store.root).publish(SHA, DATA)
    assert published.read_bytes() == DATA


def test_a_blob_that_cannot_be_written_is_not_half_there(store: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(DATA[:100])
    with pytest.raises(Exception, match="ends before"):
        store.publish(SHA, FileBody(tmp_path / "model", 0, len(DATA)))
    with pytest.raises(BlobError, match="cannot be written"):
        store.publish(SHA, FileBody(tmp_path / "nowhere", 5, len(DATA)))
    assert list((store.root / "down").iterdir()) == []


def after_a_power_cut(store: FolderStore, *damaged: str) -> FolderStore:
    """The store as it is opened when the machine runs again; files named `damaged` have their size and nothing else."""
    for path in store.root.rglob("*"):
        if path.name in damaged and path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    with mock.patch.object(boot, "this_boot", return_value="another start"):
        return FolderStore(store.root)


# Up


def test_an_upload_within_its_ticket_is_fetched(store: FolderStore) -> None:
    gateway = FolderStore(store.root)  # another process
    store.allow("ada", len(DATA), in_an_hour())
    send(gateway, "ada", DATA)
    body = store.fetch("ada", SHA, len(DATA))
    assert bytes(body.read(0, len(body))) == DATA
    again = gateway.begin_upload("ada", SHA, len(DATA))
    assert [part.done for part in again.parts] == [len(DATA)]
    gateway.finish_upload("ada", SHA)
    with pytest.raises(BlobError, match="announced"):
        store.fetch("ada", SHA, len(DATA) - 1)
    with pytest.raises(BlobError, match="has not uploaded"):
        store.fetch("bob", SHA, len(DATA))


def test_without_a_valid_ticket_nothing_begins(store: FolderStore) -> None:
    with pytest.raises(BlobRefusedError, match="no task"):
        store.begin_upload("ada", SHA, len(DATA))
    store.allow("bob", 10**9, in_an_hour())
    with pytest.raises(BlobRefusedError, match="no task"):
        store.begin_upload("ada", SHA, len(DATA))
    store.allow("ada", len(DATA), time.time() - 1)
    with pytest.raises(BlobRefusedError, match="is over"):
        store.begin_upload("ada", SHA, len(DATA))
    store.allow("ada", len(DATA) - 1, in_an_hour())
    with pytest.raises(BlobTooLargeError, match="larger than"):
        store.begin_upload("ada", SHA, len(DATA))
    with pytest.raises(BlobTooLargeError):
        store.begin_upload("ada", SHA, 100 * len(DATA))
    assert bytes_on_disk(store.root / "up") == 0


def test_a_ticket_that_is_taken_back_stops_an_upload_that_has_begun(store: FolderStore) -> None:
    gateway = FolderStore(store.root)
    store.allow("ada", len(DATA), in_an_hour())
    gateway.begin_upload("ada", SHA, len(DATA))
    held = gateway.incoming("ada", SHA)
    held.write(0, 0, DATA[:100])
    store.discard("ada")
    with pytest.raises(BlobRefusedError, match="no task"):
        gateway.incoming("ada", SHA)
    with pytest.raises(BlobRefusedError, match="no task"):
        gateway.finish_upload("ada", SHA)
    store.allow("ada", len(DATA), in_an_hour())
    with pytest.raises(BlobIncompleteError, match="not begun, or has ended"):
        gateway.incoming("ada", SHA)
    assert [part.done for part in gateway.begin_upload("ada", SHA, len(DATA)).parts] == [0]
    send(gateway, "ada", DATA)
    assert len(store.fetch("ada", SHA, len(DATA))) == len(DATA)


def test_a_new_gateway_goes_on_where_the_old_one_was_stopped(store: FolderStore) -> None:
    store.allow("ada", len(DATA), in_an_hour())
    store.begin_upload("ada", SHA, len(DATA))
    store.incoming("ada", SHA).write(0, 0, DATA[:4000])
    store.close()
    gateway = FolderStore(store.root)
    with pytest.raises(BlobIncompleteError):
        gateway.incoming("ada", SHA)
    assert [part.done for part in gateway.begin_upload("ada", SHA, len(DATA)).parts] == [4000]
    gateway.incoming("ada", SHA).write(0, 4000, DATA[4000:])
    gateway.finish_upload("ada", SHA)
    assert len(store.fetch("ada", SHA, len(DATA))) == len(DATA)


def test_what_is_not_whole_or_not_what_it_says_is_not_fetched(store: FolderStore) -> None:
    store.allow("ada", len(DATA), in_an_hour())
    with pytest.raises(BlobIncompleteError):
        store.finish_upload("ada", SHA)
    store.begin_upload("ada", SHA, len(DATA))
    store.incoming("ada", SHA).write(0, 0, DATA[:-1])
    with pytest.raises(BlobIncompleteError, match="1 of"):
        store.finish_upload("ada", SHA)
    store.incoming("ada", SHA).write(0, len(DATA) - 1, b"?")
    with pytest.raises(BlobDamagedError):
        store.finish_upload("ada", SHA)
    with pytest.raises(BlobError):
        store.fetch("ada", SHA, len(DATA))
    assert bytes_on_disk(store.root / "up") == 0
    send(store, "ada", DATA)  # it may try again


def test_however_much_a_node_sends_the_disk_holds_one_finished_and_one_unfinished_upload(store: FolderStore) -> None:
    limit = 1000
    store.allow("ada", limit, in_an_hour())
    for number in range(20):
        data = os.urandom(limit)
        store.begin_upload("ada", sha256(data), limit)
        store.incoming("ada", sha256(data)).write(0, 0, data[: limit - 1])
        if number % 3 == 0:
            store.incoming("ada", sha256(data)).write(0, limit - 1, data[-1:])
            store.finish_upload("ada", sha256(data))
        blobs = [path for path in (store.root / "up").rglob("*") if path.is_file() and path.suffix != ".progress"]
        assert sum(path.stat().st_size for path in blobs) <= 2 * limit
    assert bytes_on_disk(store.root / "up" / "ada") < 2 * limit + 1000
    store.discard("ada")
    assert not (store.root / "up" / "ada").exists()


def test_nodes_do_not_read_or_disturb_each_other(store: FolderStore) -> None:
    for node in ("ada", "bob"):
        store.allow(node, len(DATA), in_an_hour())
    send(store, "bob", DATA)
    assert store.locate(SHA) is None
    assert store.published_file(SHA) is None
    assert [part.done for part in store.begin_upload("ada", SHA, len(DATA)).parts] == [0]
    store.discard("ada")
    assert len(store.fetch("bob", SHA, len(DATA))) == len(DATA)


@pytest.mark.parametrize("name", ["../bob", "", ".", "..", "a/b", "/etc", "ada\n", "x" * 65, ".hidden", "a\0b"])
def test_a_name_that_is_none_reaches_no_file(store: FolderStore, name: str) -> None:
    with pytest.raises(BlobRefusedError):
        store.allow(name, 10, in_an_hour())
    for call in (
        lambda: store.begin_upload(name, SHA, 1),
        lambda: store.fetch(name, SHA, 1),
        lambda: store.discard(name),
    ):
        with pytest.raises(BlobRefusedError):
            call()


@pytest.mark.parametrize("sha", ["../../etc/passwd", "", "a" * 63, SHA.upper(), SHA + "\n", f"../down/{SHA}"])
def test_a_sha256_that_is_none_reaches_no_file(store: FolderStore, sha: str) -> None:
    store.allow("ada", 10**6, in_an_hour())
    store.publish(SHA, DATA)
    assert store.locate(sha) is None
    for call in (
        lambda: store.begin_upload("ada", sha, 1),
        lambda: store.finish_upload("ada", sha),
        lambda: store.fetch("ada", sha, 1),
        lambda: store.publish(sha, DATA),
    ):
        with pytest.raises(BlobRefusedError):
            call()


def test_the_folder_store_is_a_blob_store_and_its_folder_is_private(store: FolderStore) -> None:
    checked: BlobStore = store  # mypy holds the two together
    assert checked.published() == set()
    assert store.root.stat().st_mode & 0o777 == 0o700


def test_an_empty_upload_is_whole_at_once(store: FolderStore) -> None:
    store.allow("ada", 0, in_an_hour())
    assert store.begin_upload("ada", sha256(b""), 0) == Location(bytes=0, parts=[])
    store.finish_upload("ada", sha256(b""))
    assert len(store.fetch("ada", sha256(b""), 0)) == 0


def test_what_was_fetched_is_out_of_the_reach_of_its_node(store: FolderStore) -> None:
    """A node that sends something else while the Aggregator reads would otherwise take the file away under it."""
    gateway = FolderStore(store.root)
    store.allow("ada", len(DATA), in_an_hour())
    send(gateway, "ada", DATA)
    body = store.fetch("ada", SHA, len(DATA))
    other = bytes(reversed(DATA))
    send(gateway, "ada", other)
    assert bytes(body.read(0, len(body))) == DATA
    assert gateway.begin_upload("ada", SHA, len(DATA)).parts[0].done == len(DATA)  # asked again, it need not send again
    assert bytes(store.fetch("ada", hashlib.sha256(other).hexdigest(), len(DATA)).read(0, len(DATA))) == other
    store.discard("ada")
    assert not list(store.root.rglob(SHA))


@pytest.mark.parametrize("fetched", [False, True])
def test_an_upload_that_a_power_cut_has_spoilt_is_sent_again(store: FolderStore, fetched: bool) -> None:
    for node in ("ada", "bob"):
        store.allow(node, len(DATA), in_an_hour())
    other = bytes(reversed(DATA))
    send(store, "ada", DATA)
    send(store, "bob", other)
    if fetched:
        for node, data in (("ada", DATA), ("bob", other)):
            store.fetch(node, sha256(data), len(data))
    again = after_a_power_cut(store, SHA)
    with pytest.raises(BlobError, match="has not uploaded"):
        again.fetch("ada", SHA, len(DATA))
    assert [part.done for part in again.begin_upload("ada", SHA, len(DATA)).parts] == [0]
    assert [part.done for part in again.begin_upload("bob", sha256(other), len(DATA)).parts] == [len(DATA)]
    send(again, "ada", DATA)
    assert again.fetch("ada", SHA, len(DATA)).path.read_bytes() == DATA
    assert again.fetch("bob", sha256(other), len(DATA)).path.read_bytes() == other


def test_a_process_that_is_started_anew_does_not_hash_what_is_there(store: FolderStore) -> None:
    store.allow("ada", len(DATA), in_an_hour())
    send(store, "ada", DATA)
    with mock.patch.object(boot, "_is_whole", side_effect=AssertionError("hashed")):
        assert len(FolderStore(store.root).fetch("ada", SHA, len(DATA))) == len(DATA)


def test_an_upload_that_was_interrupted_by_a_power_cut_goes_on_or_begins_again(store: FolderStore) -> None:
    store.allow("ada", len(DATA), in_an_hour())
    store.begin_upload("ada", SHA, len(DATA))
    store.incoming("ada", SHA).write(0, 0, DATA[:4000])
    store.close()
    again = after_a_power_cut(store, f"{SHA}.partial")  # the progress is ahead of the bytes
    assert [part.done for part in again.begin_upload("ada", SHA, len(DATA)).parts] == [4000]
    again.incoming("ada", SHA).write(0, 4000, DATA[4000:])
    with pytest.raises(BlobDamagedError):
        again.finish_upload("ada", SHA)
    send(again, "ada", DATA)
