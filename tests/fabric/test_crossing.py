"""An update on its way: one at a time, begun once, left when it is not wanted, and whole when `finish` says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import pytest
from tests.fabric.gateways import Site, in_thread, sha256, some_bytes

from photon.fabric import crossing
from photon.fabric.crossing import Crossing, Sending
from photon.link.body import FileBody, whole_file
from photon.link.client import GatewayClient, LinkRefusedError

DEADLINE_S = 10.0


class Wire:
    """Stands for the network: an upload waits to be let through, moves bytes one by one, and may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.whole: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self.open = Event()
        self.errors: list[Exception] = []
        monkeypatch.setattr(crossing, "upload", self.upload)

    def upload(
        self, client: object, name: str, body: FileBody, *, streams: int, deadline_s: float, on_bytes: Any
    ) -> None:
        self.begun.append(name)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            while not self.open.wait(0.002):
                on_bytes(0)
            if self.errors:
                raise self.errors.pop(0)
            on_bytes(len(body))
            self.whole.append(name)
        finally:
            self.at_once -= 1


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


def begin(upload: Sending, name: str, on_bytes: Callable[[int], None] = lambda count: None) -> Crossing:
    return upload.begin(name, FileBody(Path("/nowhere"), 0, 3), DEADLINE_S, on_bytes)


def sent() -> Sending:
    return Sending(cast(GatewayClient, None), 1)


def test_what_is_on_its_way_or_there_is_not_begun_again(wire: Wire) -> None:
    upload = sent()
    way = begin(upload, "a")
    way = begin(upload, "a")
    wire.open.set()
    way.finish(lambda: None)
    way = begin(upload, "a")
    way.finish(lambda: None)
    assert (wire.begun, wire.whole) == (["a"], ["a"])


def test_other_bytes_take_its_place_and_never_travel_beside_it(wire: Wire) -> None:
    """A store keeps one unfinished upload of a node: two at once would undo each other."""
    upload = sent()
    first = begin(upload, "a")
    ways: list[Crossing] = []
    second = Thread(target=lambda: ways.append(begin(upload, "b")), daemon=True)
    second.start()
    second.join(DEADLINE_S)
    assert not second.is_alive()
    wire.open.set()
    ways[0].finish(lambda: None)
    assert first.is_in_vain
    assert (wire.begun, wire.whole, wire.most_at_once) == (["a", "b"], ["b"], 1)


def test_what_was_left_is_begun_again_though_it_had_arrived(wire: Wire) -> None:
    """Between two tasks an Aggregator may have removed it."""
    upload = sent()
    wire.open.set()
    for _ in range(2):
        way = begin(upload, "a")
        way.finish(lambda: None)
        way.leave()
    assert wire.begun == ["a", "a"]


def test_what_is_left_stops_at_its_next_piece(wire: Wire) -> None:
    upload = sent()
    way = begin(upload, "a")
    way.leave()
    until_none_runs()
    assert wire.whole == []


def test_what_is_left_ends_though_nothing_moves(tmp_path: Path) -> None:
    """Where nobody answers no piece is ever moved, and what comes next would wait until its deadline."""
    body = tmp_path / "body"
    body.write_bytes(b"abc")
    upload = Sending(Site(tmp_path).client(port=1), 1)
    way = upload.begin(sha256(b"abc"), whole_file(body), 1e6, lambda count: None)
    way.leave()
    until_none_runs()


def until_none_runs() -> None:
    for thread in threading.enumerate():
        if thread.name == "photon-crossing":
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def test_what_kept_it_from_arriving_is_told_to_who_waits_and_it_may_be_tried_again(wire: Wire) -> None:
    upload = sent()
    wire.open.set()
    wire.errors = [LinkRefusedError("the time for this upload is over")]
    way = begin(upload, "a")
    with pytest.raises(LinkRefusedError, match="time for this upload"):
        way.finish(lambda: None)
    way = begin(upload, "a")
    way.finish(lambda: None)
    assert (wire.begun, wire.whole) == (["a", "a"], ["a"])


def test_who_waits_is_asked_whether_it_is_still_wanted(wire: Wire) -> None:
    upload = sent()
    way = begin(upload, "a")

    def unwanted() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        way.finish(unwanted)
    way.leave()
    until_none_runs()


def test_without_a_thread_to_send_it_the_reply_fails_and_not_the_node(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self: Thread) -> None:
        raise RuntimeError("can't start new thread")

    upload = sent()
    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", exhausted)
        way = begin(upload, "a")
    with pytest.raises(RuntimeError, match="new thread"):
        way.finish(lambda: None)


def test_through_a_gateway_the_last_bytes_alone_are_kept(tmp_path: Path) -> None:
    """What was sent before of other bytes is removed, and what arrived is to the byte what was to be sent."""
    site = Site(tmp_path)
    site.store.allow("ada", 10**7, 2**40)
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(some_bytes(3_000_000, 1))
    second.write_bytes(some_bytes(2_000_000, 2))
    names = {path: sha256(path.read_bytes()) for path in (first, second)}
    with in_thread(site):
        upload = Sending(site.client(), 2)
        for path in (first, second):
            way = upload.begin(names[path], whole_file(path), DEADLINE_S, lambda count: None)
        way.finish(lambda: None)
        arrived = site.store.fetch("ada", names[second], 2_000_000)
    assert bytes(arrived.read(0, arrived.size)) == second.read_bytes()
    assert not (tmp_path / "store" / "up" / "ada" / names[first]).exists()
