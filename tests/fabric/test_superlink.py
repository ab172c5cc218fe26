"""What nodes do to a SuperLink does not fill its log."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.fabric.superlinks import superlink as superlinks

from photon.fabric import superlink
from photon.fabric.flwr_internals import ActivateNodeRequest, FlowerDownError, failures


def line(text: str = "no %s", word: str = "run") -> logging.LogRecord:
    return logging.LogRecord("flwr", logging.ERROR, "x.py", 1, text, (word,), None)


def test_so_many_lines_a_minute_are_written_and_the_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, most = [100.0], superlink.MAX_LINES_A_MINUTE
    monkeypatch.setattr(superlink, "time", SimpleNamespace(monotonic=lambda: now[0]))
    few = superlink.FewLines()
    assert [bool(few.filter(line())) for _ in range(1000)] == [True] * most + [False] * (1000 - most)
    now[0] = 161.0
    first, second = line(), line()
    assert few.filter(first)
    assert first.getMessage() == f"no run ({1000 - most} lines before it were left out)"
    assert few.filter(second)
    assert second.getMessage() == "no run"


def test_a_node_that_is_refused_again_and_again_does_not_fill_the_disk(tmp_path: Path) -> None:
    with superlinks(tmp_path, ["ada"]) as link, closing(link.run()), closing(link.node("ada")) as ada:
        ada.join(None)
        for _ in range(3 * superlink.MAX_LINES_A_MINUTE):
            with pytest.raises(FlowerDownError, match="HTTP 400"), failures("activate"):
                ada._client.ActivateNode(ActivateNodeRequest(heartbeat_interval=1e9))
        lines = (tmp_path / "superlink.log").read_text().count("activate-node")
    assert 0 < lines <= 2 * superlink.MAX_LINES_A_MINUTE  # a minute may end meanwhile
