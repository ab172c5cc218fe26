"""Every byte of a blob that crossed is on its node's account."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.fabric.gateways import (
    DEADLINE_S,
    Site,
    allow,
    ask,
    begin,
    finish,
    in_thread,
    put,
    sha256,
    some_bytes,
)

MIB = 2**20
DATA = some_bytes(100_000, seed=1)
SHA = "0" * 64


@pytest.fixture
def own_site(tmp_path: Path) -> Site:
    """A site whose gateway the test starts itself."""
    return Site(tmp_path)


def test_every_byte_of_a_body_is_accounted_for_also_what_was_sent_twice_or_refused(own_site: Site) -> None:
    data = DATA
    with in_thread(own_site):
        own_site.store.publish(sha256(data), data)
        allow(own_site, "ada", len(data))
        ask(own_site, "GET", f"/v1/blobs/{sha256(data)}/data")
        ask(own_site, "GET", f"/v1/blobs/{sha256(data)}/data", Range="bytes=0-999")
        ask(own_site, "GET", f"/v1/blobs/{sha256(data)}/data", Range="bytes=0-99", name="bob")
        for _ in range(2):
            begin(own_site, SHA, len(data))
            put(own_site, data, 0, len(data), SHA)
            assert finish(own_site, SHA).status == 422
    bob = {"bytes_up": 0, "bytes_down": 100}
    assert own_site.traffic() == {"ada": {"bytes_up": 200_000, "bytes_down": 101_000}, "bob": bob}
    with in_thread(own_site):  # a gateway that starts again goes on with the accounts, and writes them while it runs
        ask(own_site, "GET", f"/v1/blobs/{sha256(data)}/data", Range="bytes=0-0")
        deadline = time.monotonic() + DEADLINE_S
        while own_site.traffic()["ada"]["bytes_down"] == 101_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert own_site.traffic()["ada"]["bytes_down"] == 101_001
