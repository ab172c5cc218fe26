"""A process that ends at any step of a run, and whether the run survives it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.support import Federation, InlineFabric, tiny_recipe, without_timings

from photon import durable
from photon.aggregator.state import RoundStore
from photon.config import Recipe
from photon.errors import PhotonError
from photon.node.state import NodeStore
from photon.track import Tracker


class Crash(BaseException):
    """The process ends here: nothing in between may catch it."""


@contextmanager
def crash_at(step: int) -> Iterator[list[str]]:
    """Raise Crash at the `step`-th thing done that outlives the process (counted from 0); files are half written.

    Gives the list of what was done, so that a run without a crash counts the steps there are.
    """
    done: list[str] = []

    def crashing(what: str, original: Callable[..., Any], halfway: Callable[..., Any] = lambda *_: None) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            done.append(what)
            if len(done) - 1 == step:
                halfway(*arguments)
                raise Crash(what)
            return original(*arguments, **options)

        return call

    def write_half(path: Path, chunks: Iterable[bytes]) -> None:
        data = b"".join(chunks)
        path.write_bytes(data[: len(data) // 2])

    with (
        mock.patch.object(durable, "_write_synced", crashing("write a file", durable._write_synced, write_half)),
        mock.patch.object(Path, "rename", crashing("rename", Path.rename)),
        mock.patch.object(shutil, "rmtree", crashing("remove", shutil.rmtree)),
        mock.patch.object(Tracker, "write", crashing("record an event", Tracker.write)),
        mock.patch.object(Tracker, "sync", crashing("make events durable", Tracker.sync)),
        mock.patch.object(InlineFabric, "receive", crashing("wait for a reply", InlineFabric.receive)),
        mock.patch.object(RoundStore, "commit", crashing("commit the round", RoundStore.commit)),
        mock.patch.object(NodeStore, "commit", crashing("commit a node", NodeStore.commit)),
    ):
        yield done


def survives(
    folder: Path, begun: Path, recipe: Recipe, expected: object, step: int, look: Callable[[Federation], object]
) -> bool:
    """Whether a run that crashes at `step` and is begun again ends as one that was never disturbed."""
    shutil.copytree(begun, folder)
    with crash_at(step), pytest.raises(Crash):
        Federation(folder, recipe).run()
    try:
        again = Federation(folder, recipe)
        outcome = again.run().model_sha256, without_timings(again.events())
    except (PhotonError, OSError, ValueError, KeyError):
        return False
    look(again)
    return outcome == expected


def steps_that_do_not_survive(
    folder: Path, look: Callable[[Federation], object] = lambda again: None, begin: int = 1, **sections: Any
) -> Iterator[str]:
    """Crash at each step of the round after `begin`, its commit and the end of the run; say which of them showed.

    `look` is shown every federation that went on after a crash.
    """
    changes = sections.pop("federation", {})

    def recipe(rounds: int) -> Recipe:
        options = {"rounds": rounds, "tau": 1, "outer": "nesterov", "outer_lr": 0.7, **changes}
        return tiny_recipe(["ada", "bob"], federation=options, **sections)

    begun, whole = folder / "begun", folder / "whole"
    Federation(begun, recipe(begin)).run()
    shutil.copytree(begun, whole)
    undisturbed = Federation(whole, recipe(begin + 1))
    with crash_at(-1) as done:
        expected = (undisturbed.run().model_sha256, without_timings(undisturbed.events()))
    assert set(done) == {
        "wait for a reply", "commit a node", "commit the round", "write a file", "rename", "remove",
        "record an event", "make events durable",
    }  # fmt: skip
    for step, what in enumerate(done):
        if not survives(folder / str(step), begun, recipe(begin + 1), expected, step, look):
            yield f"{step}: {what}"
