"""The fabric of a file is all that the Aggregator asks of a fabric."""

from __future__ import annotations

from pathlib import Path

from benchmarks.aggregator_memory import FromFile

from photon.fabric.base import Fabric


def test_it_has_every_member_of_a_fabric() -> None:
    fabric = FromFile(["ada"], Path("update"), "0" * 64)
    missing = [name for name in vars(Fabric) if not name.startswith("_") and not hasattr(fabric, name)]
    assert not missing
