"""No command's seconds have the making of tokens in them."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from benchmarks import site_rounds
from photon.recipe import load_recipe


def test_tokens_are_made_before_the_first_command(tmp_path: Path) -> None:
    done: list[str] = []
    with (
        mock.patch.object(site_rounds, "builtin_text", lambda *_: done.append("tokens"), create=True),
        mock.patch.object(site_rounds.subprocess, "run", lambda *_, **__: done.append("command")),
        mock.patch.object(site_rounds, "_row", return_value={}),
        mock.patch.object(site_rounds, "Report"),
    ):
        site_rounds.main(1, "data", tmp_path)
    assert done == ["tokens", "command", "command"]


def test_one_round_can_be_measured() -> None:
    recipe = load_recipe("demo", ["federation.rounds=3", *site_rounds._OPTIONS.split()])
    assert recipe.total_steps == 3
