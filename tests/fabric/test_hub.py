"""What is prepared for the parts of a hub, and what a damaged or half-written file of it costs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tests.support import tiny_recipe

from photon.errors import InputError
from photon.fabric.hub import Hub
from photon.recipe import dump_recipe
from photon.runfolder import RunFolder
from photon.status import read_status

RECIPE = tiny_recipe()


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """That of a run which has not begun."""
    folder = RunFolder(tmp_path / "run")
    folder.tokenizer.mkdir(parents=True)
    (folder.tokenizer / "tokenizer.json").write_text("{}")
    folder.recipe.write_text(dump_recipe(RECIPE))
    folder.write_identity(13)
    return Hub(folder)


def prepare(hub: Hub) -> None:
    hub.prepare(RECIPE, hub.folder.path / "keys", "127.0.0.1", 0)


def test_a_secret_is_made_once_and_is_the_owners_alone(hub: Hub) -> None:
    prepare(hub)
    secret = hub.secret.read_bytes()
    assert len(secret) == 32
    assert stat.S_IMODE(hub.secret.stat().st_mode) == 0o600
    prepare(hub)
    assert hub.secret.read_bytes() == secret


def test_a_disk_that_is_full_leaves_no_secret_that_everybody_knows(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one would be taken for good ever after."""

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    hub.path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises((InputError, OSError), match="No space left"):
            prepare(hub)
    assert not hub.secret.exists()


def test_a_run_that_has_not_begun_has_no_status_and_not_a_damaged_one(hub: Hub) -> None:
    prepare(hub)
    with pytest.raises(InputError, match="has no status: only photon aggregator keeps one, once it has begun"):
        read_status(str(hub.folder.path), None)


def test_accounts_that_a_power_cut_has_spoilt_end_no_round(hub: Hub) -> None:
    """They are not synced. The gateway counts from zero then."""
    prepare(hub)
    hub.traffic.write_bytes(b"")
    assert hub._sent() == {}
    hub.traffic.write_text('{"ada": {"sent_up": 5, "sent_down": 7}}')
    assert hub._sent() == {"ada": (7, 5)}
