"""A method that needs most of a node, what it remembers and how many nodes there are, is the same over the network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.faults.proxy import Proxy
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


SAFE = "quorum = 1.0\ndeadline_s = 300.0\n[checkpoint]\nkeep_last = 99\n"
BYTES_PER_S = 70_000  # an update of 140 kB then takes as long as the training of several rounds
LONG = 14  # rounds; more than there are disturbances


@pytest.mark.parametrize("parts", [EAGER, 'parts = ["fragments(count=2, delay=1)"]'], ids=["eager", "fragments"])
def test_who_trains_on_while_its_update_travels_survives_what_others_do(tmp_path: Path, parts: str) -> None:
    """kill -9 of a trainer, a node, the round loop and the whole Aggregator, each while a node is a round ahead."""
    extra = f"{parts}\n{SAFE}"
    model_sha256 = undisturbed(tmp_path / "texts", LONG, extra, OWNERS, tau=20)
    with (
        Sites(tmp_path / "sites", tmp_path / "texts", rounds=LONG, owners=OWNERS, extra=extra, tau=20) as sites,
        Proxy("127.0.0.1", sites.port) as line,
    ):
        line.throttle(BYTES_PER_S)

        def early(owner: str) -> list[int]:
            """Rounds that a node has begun before they were asked for."""
            return [
                int(number) for number in re.findall(r"round (\d+): begun early", sites.node_log(owner).read_text())
            ]

        def until_ahead(owner: str) -> None:
            seen = len(early(owner))
            sites.wait_until(lambda: len(early(owner)) > seen, f"{owner} begins another round early")

        def kill_node() -> None:
            sites.kill_node("ada")
            sites.start_node("ada", line.port)

        def kill_trainer() -> None:
            if (trainer := sites.trainer("ada")) is not None:
                trainer.kill()

        def kill_aggregator() -> None:
            sites.kill_aggregator()
            sites.start_aggregator()

        sites.start_aggregator()
        for owner in OWNERS:
            sites.start_node(owner, line.port)
        for disturb in (kill_trainer, lambda: sites.kill_part("rounds"), kill_node, kill_aggregator):
            until_ahead("ada")
            disturb()
        until_ahead("bob")
        line.throttle(None)
        sites.finish()
        assert sites.model_sha256() == model_sha256
        assert max(early("ada")) > 4
        sites.check_streams()
