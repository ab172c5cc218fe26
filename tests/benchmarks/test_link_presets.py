"""A run that is there is used if it is the one that is asked for, and only then."""

from __future__ import annotations

import subprocess
from pathlib import Path
from unittest import mock

import pytest
import typer

from benchmarks import link_presets
from photon.recipe import dump_recipe, load_recipe

ASKED = ["demo", "seed=1", "federation.tau=8", "link=balanced"]


def test_a_run_of_other_options_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(dump_recipe(load_recipe("demo", ["seed=1", "link=balanced"])))
    (tmp_path / "summary.json").write_text("{}")
    with mock.patch.object(link_presets.Summary, "model_validate_json") as read, pytest.raises(typer.BadParameter):
        read.return_value.status = "finished"
        link_presets._run(tmp_path, ASKED)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(dump_recipe(load_recipe(ASKED[0], ASKED[1:])))
    (tmp_path / "summary.json").write_text("{}")
    with (
        mock.patch.object(link_presets.Summary, "model_validate_json") as read,
        mock.patch.object(subprocess, "run") as train,
    ):
        read.return_value.status = "finished"
        assert link_presets._run(tmp_path, ASKED) is read.return_value
    train.assert_not_called()
