"""The options of `photon compare`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon import compare
from photon.cli import app
from photon.cli_compare import CompareOptions, command_line
from photon.compare import Asked
from photon.compare_plan import Request
from photon.errors import StoppedError


def test_the_command_says_what_differs_from_the_default() -> None:
    options = CompareOptions(words=["demo", "data.dir=my data"], seeds=3, target_loss=4.5, out=Path("o"))
    assert command_line(options) == "photon compare demo 'data.dir=my data' --seeds 3 --target-loss 4.5 --out o"
    assert command_line(CompareOptions()) == "photon compare"


def test_the_options_become_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Request, Asked]] = []

    def stop(request: Request, rest: Asked, console: object) -> None:
        asked.append((request, rest))
        raise StoppedError("enough")

    monkeypatch.setattr(compare, "compare", stop)
    words = "compare llama-125m node.lr=1 --methods fedavg,diloco --budget tokens=8M --seeds 3 --tune 4 --links 1Gbps"
    CliRunner().invoke(app, words.split())
    ((request, rest),) = asked
    assert (request.source, request.overrides) == ("llama-125m", ("node.lr=1",))
    assert [method.name for method in request.methods] == ["fedavg", "diloco"]
    assert (request.budget_tokens, request.seeds, request.tune) == (8_000_000, 3, 4)
    assert (rest.links, rest.device, rest.out, rest.jobs, rest.target_loss) == (("1Gbps",), "h100", None, None, None)
    assert rest.command == f"photon {words}".replace("--tune 4 --links 1Gbps", "--links 1Gbps --tune 4")
