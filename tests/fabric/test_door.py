"""Nobody takes all the connections that a gateway can hold, whether it may come in or not."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from tests.fabric.gateways import DEADLINE_S, Site, ask, ask_over, connect, in_thread

from photon.fabric import door, gateway
from photon.fabric.transport import Patience


@pytest.fixture
def own_site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_who_knocks_longest_and_shows_nothing_makes_room(own_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_KNOCKING", 3)
    with in_thread(own_site), ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", own_site.port), timeout=DEADLINE_S))
            for _ in range(9)
        ]
        began = time.monotonic()
        assert [one.recv(1) for one in silent[:5]] == [b""] * 5
        assert ask(own_site, "GET", "/v1/run").status == 200
        assert time.monotonic() - began < gateway.HANDSHAKE_S / 2
        assert ask(own_site, "GET", "/v1/run", name="bob").status == 200


def test_one_identity_has_few_connections_and_others_are_not_touched(
    own_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_CONNECTIONS", 2)
    with in_thread(own_site):
        with ExitStack() as stack:
            for _ in range(2):
                kept = stack.enter_context(closing(connect(own_site, "bob")))
                assert ask_over(kept, "GET", "/v1/run").status == 200
            with pytest.raises((ConnectionError, ssl.SSLError)):
                ask(own_site, "GET", "/v1/run", name="bob")
            assert ask(own_site, "GET", "/v1/run").status == 200
            assert ask_over(kept, "GET", "/v1/run").status == 200
        end = time.monotonic() + DEADLINE_S
        while True:  # until the gateway has seen that they are closed
            try:
                assert ask(own_site, "GET", "/v1/run", name="bob").status == 200
                break
            except (ConnectionError, ssl.SSLError):
                assert time.monotonic() < end


@pytest.mark.parametrize("others", [0, 1])
def test_an_address_of_a_name_that_the_machine_does_not_have_is_passed_over(
    own_site: Site, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """In a container `localhost` often stands for ::1 as well, and there is no IPv6."""
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    absent = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))

    def addresses(*words: object, **options: object) -> list[object]:
        return [absent, here][: others + 1]

    async def listen() -> str:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", AsyncMock(side_effect=addresses))
        patience = Patience(1.0, 1.0, 1.0)
        unused: Any = None
        async with door.Door(unused, unused, unused, unused, patience).open("name", 0) as (host, _):
            return host

    if others:
        assert asyncio.run(listen()) == "127.0.0.1"
    else:
        with pytest.raises(OSError, match="assign requested address"):
            asyncio.run(listen())
