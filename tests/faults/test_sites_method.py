"""A method that needs most of a node, what it remembers and how many nodes there are, is the same over the network."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults.sites import Sites, undisturbed

pytestmark = [pytest.mark.sites, pytest.mark.timeout(600)]

OWNERS, ROUNDS = ("ada", "bob"), 4
EAGER = 'parts = ["eager"]'


def test_sites_begin_ahead_by_the_same_share_as_virtual_nodes(tmp_path: Path) -> None:
    """A site's own recipe has itself alone: one that takes K from there begins ahead by the whole of its step."""
    model_sha256 = undisturbed(tmp_path / "texts", ROUNDS, EAGER, OWNERS)
    with Sites(tmp_path / "sites", tmp_path / "texts", rounds=ROUNDS, owners=OWNERS, extra=EAGER) as sites:
        sites.start()
        sites.finish()
        assert sites.model_sha256() == model_sha256
