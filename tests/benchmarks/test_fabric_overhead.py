"""The bare loops of `fabric_overhead` do what the nodes did and are not waited for in vain; its parts exist."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
from benchmarks.fabric_overhead import AGGREGATOR_PARTS, NODE_PARTS, BareAnswer, BareProcess, Duel

import photon
from photon.recipe import load_recipe
from photon.runfolder import RunFolder

PACKAGE = Path(photon.__file__).parent


@pytest.mark.parametrize("function", sorted(NODE_PARTS | AGGREGATOR_PARTS))
def test_every_part_is_a_function_that_does_its_work_when_called(function: str) -> None:
    file, _, name = function.partition(":")
    body = re.search(rf"\n( *)def {name}\(.*?(?=\n\1\S|\Z)", (PACKAGE / file).read_text(encoding="utf-8"), re.DOTALL)
    assert body is not None, "a part that is not found is left out of the table without a word"
    # What returns a generator has done nothing yet: the work is the generator's own.
    assert "-> Iterator" not in body[0] or "yield" in body[0]


def test_bare_loops_do_the_steps_of_the_nodes_that_took_part(tmp_path: Path) -> None:
    asked: list[dict[str, int]] = []

    class Loop:
        def begin(self, steps: dict[str, int]) -> None:
            asked.append(steps)

        def end(self) -> BareAnswer:
            return BareAnswer(1.0, {})

    duel = Duel(load_recipe("demo", ["federation.nodes_per_round=2"]), RunFolder(tmp_path))
    duel.loops, duel.workers = cast(Any, [Loop()]), 1
    nodes = {"net": SimpleNamespace(steps=16, seconds=1.0), "core": SimpleNamespace(steps=12, seconds=1.0)}
    event = SimpleNamespace(round=2, nodes=nodes, round_tokens=1, phases_s={})
    duel._take_turn(cast(Any, event), 1.0, 1.0)
    assert asked == [{"net": 16, "core": 12}]


@pytest.mark.timeout(10)
def test_a_bare_process_that_ended_before_it_was_ready_is_not_waited_for() -> None:
    started = SimpleNamespace(start=lambda: None)
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=lambda **_: started)
    with mock.patch("multiprocessing.get_context", return_value=context), pytest.raises(EOFError):
        BareProcess(Path("run"), ["core"], 1)
