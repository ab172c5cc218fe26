"""Every benchmark starts: its modules find what they import, and what it cannot do it refuses before it measures."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import typer

import benchmarks

NAMES = [found.name for found in pkgutil.iter_modules(benchmarks.__path__)]
COUNTS = ("turns", "repeats", "rounds", "megabytes", "streams", "sequences")


@pytest.mark.parametrize("name", NAMES)
def test_it_finds_what_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_not_measured(name: str) -> None:
    """A median of no turns is no number: the command refuses to take none."""
    main = getattr(importlib.import_module(f"benchmarks.{name}"), "main", None)
    parameters = inspect.signature(main, eval_str=True).parameters.values() if main is not None else []
    options = {
        one.name: one.annotation.__metadata__[0] for one in parameters if hasattr(one.annotation, "__metadata__")
    }
    assert {count for count in COUNTS if count in options and not (options[count].min or 0) >= 1} == set()


@pytest.mark.parametrize(("name", "option"), [("all", "only"), ("bare_loop", "sizes"), ("gpu", "shapes")])
def test_an_unknown_name_is_refused_before_anything_is_measured(name: str, option: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"--{option} nope: there are: "):
        importlib.import_module(f"benchmarks.{name}").main(**{option: ["nope"]})
