"""A missing extra is named with the command that installs it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from photon import extras
from photon.errors import InputError

ROOT = Path(__file__).parents[1]


def test_what_is_there_is_not_complained_about() -> None:
    extras.require("sites")


def test_what_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras._MODULES, "sites", ("json", "no_such_module"))
    with pytest.raises(InputError, match=r"no_such_module is not installed.*pip install 'photon-federated\[sites\]'"):
        extras.require("sites")


def test_the_extra_installs_what_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, modules in extras._MODULES.items():
        listed = {
            requirement.partition("=")[0].partition(">")[0] for requirement in project["optional-dependencies"][extra]
        }
        assert set(modules) <= listed
