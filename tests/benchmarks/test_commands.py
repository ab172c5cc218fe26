"""Every benchmark starts: its modules find what they import."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks

NAMES = [found.name for found in pkgutil.iter_modules(benchmarks.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_it_finds_what_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
